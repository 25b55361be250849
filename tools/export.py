"""Write a trained model in another form.

    python tools/export.py hf --checkpoint runs/demo --out demo-hf                # a Hugging Face directory
    python tools/export.py hf --checkpoint runs/demo --out demo-hf --words all    # one for each of BabyLM's revisions
    python tools/export.py packed --checkpoint runs/demo --out demo.safetensors               # 2 bits a ternary weight
    python tools/export.py packed --checkpoint runs/demo --out demo.safetensors --bits 1.6    # five to a byte

The layouts stand in bitmar/export/huggingface.py and packed.py. Any ZeRO stage and world can have written the
checkpoint. Nothing is uploaded: `hf` prints the commands that do it.
Exit code 0: written; 2: a mistake in what was asked, or a damaged checkpoint, which is named.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.export.huggingface import VISION_MODEL, export_directory, plan_export
from bitmar.export.model_card import Revision, upload_commands
from bitmar.export.packed import packed_tokenizer, save_packed
from bitmar.loading import find_checkpoint, load_trained
from bitmar.model.bitmar import parameter_counts
from bitmar.model.packed import PLACES


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="export", description=(__doc__ or "").split("\n\n")[0])
    forms = parser.add_subparsers(dest="form", required=True, metavar="FORM")
    hf = forms.add_parser("hf", help="a directory that transformers loads with trust_remote_code")
    hf.add_argument("--out", type=Path, required=True, metavar="DIR")
    hf.add_argument(
        "--words", metavar="N", help="the checkpoint at a milestone (10M); all: one folder in DIR for each, and main"
    )
    hf.add_argument(
        "--vision_model", default=VISION_MODEL, metavar="NAME", help=f"for images (default: {VISION_MODEL})"
    )
    packed = forms.add_parser("packed", help="one safetensors file: ternary weights packed, all else in bf16")
    packed.add_argument("--out", type=Path, required=True, metavar="FILE")
    packed.add_argument("--bits", choices=tuple(PLACES), default="2", help="of a ternary weight (default: 2)")
    for form in (hf, packed):
        where = "a run's folder or a checkpoint"
        form.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help=where)
    return parser.parse_args(arguments)


def write_packed(known: argparse.Namespace) -> None:
    """Write the file and print its size."""
    loaded = load_trained(known.checkpoint)
    save_packed(loaded.model, loaded.memory, known.out, loaded.config.data.row_tokens, known.bits)
    shutil.copyfile(loaded.tokenizer, packed_tokenizer(known.out))
    size, full = known.out.stat().st_size, 4 * sum(parameter_counts(loaded.model).values())
    print(f"written: {known.out} ({size / 1e6:.2f} MB; the weights in fp32 {full / 1e6:.2f} MB, {full / size:.1f}x)")


def write_hf(known: argparse.Namespace) -> None:
    """Write the directories and print how to upload them."""
    run, checkpoint = find_checkpoint(known.checkpoint)
    parts = plan_export(run, known.words, checkpoint)
    single = known.words != "all"
    revisions = [Revision(name, known.out if single else known.out / name) for name, _ in parts]
    short = [Revision(r.name, r.directory.relative_to(known.out.parent)) for r in revisions]  # a card tells no machine
    for revision, (_, checkpoint) in zip(revisions, parts, strict=True):
        loaded = load_trained(checkpoint)
        export_directory(loaded, revision.directory, short, known.vision_model)
        print(f"written: {revision.directory} (step {loaded.progress.step:,}, {loaded.progress.words:,} words)")
    print(f"\nTo upload, in Python:\n\n{upload_commands(revisions)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what was asked for."""
    known = parse(arguments)
    try:
        {"hf": write_hf, "packed": write_packed}[known.form](known)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
