r"""Text from a trained model: of an image's vector, of a prompt, of both or of neither.

    python tools/generate.py --checkpoint runs/demo --vector image.npy
    python tools/generate.py --checkpoint runs/demo --vector image.npy --prompt "a dog" --beams 4
    python tools/generate.py --checkpoint runs/demo --temperature 0.8 --top_p 0.95 --seed 3 --count 5
    python tools/generate.py --checkpoint runs/demo --vector rex.npy --prompt "rex the dog" \
        --write_episode rex.safetensors
    python tools/generate.py --checkpoint runs/demo --vector rex.npy --memory rex.safetensors

--vector takes a .npy of one vector, or of several in rows, which make a text each. --memory off reads an empty memory;
a file takes the place of the checkpoint's own. --write_episode shows the model vector and prompt as a pair, once, and
writes the memory that has it. Greedy unless a temperature or beams are asked for. Prints a text a line, with line
breaks in it as \n. Exit code 0: done; 2: a mistake in what was asked, or a damaged checkpoint, which is named.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.config_checks import require
from bitmar.export.packed import load_packed, packed_tokenizer, read_header
from bitmar.generation.episodes import load_memory, remember, save_memory
from bitmar.generation.generate import check_vectors, generate
from bitmar.generation.sampling import Sampling
from bitmar.loading import load_trained
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState
from bitmar.model.packed import freeze
from shards.tokenizer import BOS, TextTokenizer
from tools.attention_patterns import read_vector

LINE_BREAK = re.compile(r"[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="generate", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="RUN", help="a run's folder, a checkpoint or an export")
    add("--vector", type=Path, metavar="FILE", help="the image's vector, or several in rows: a .npy")
    add("--prompt", default="", help="how the text begins")
    add("--memory", default="on", metavar="on|off|FILE", help="the checkpoint's (default), none, or that of a file")
    add("--write_episode", type=Path, metavar="FILE", help="remember vector and prompt as a pair")
    add("--max_tokens", type=int, metavar="N", help="new ones at most (default: as many as a row of training holds)")
    add("--temperature", type=float, default=0.0, help="0: the likeliest token each time (default)")
    add("--top_k", type=int, metavar="K", help="draw among the K likeliest tokens")
    add("--top_p", type=float, default=1.0, metavar="P", help="draw among the likeliest that sum to P")
    add("--beams", type=int, default=1, metavar="N", help="beam search")
    add("--length_penalty", type=float, default=1.0, help="of beams: log probability / length ** penalty")
    add("--seed", type=int, default=0)
    add("--count", type=int, default=1, metavar="N", help="texts of each vector, drawn with seed, seed + 1, ...")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a text for each vector."""
    known = parse(arguments)
    try:
        for text in texts_of(speaker(known.checkpoint), known):
            print(LINE_BREAK.sub(lambda found: repr(found[0])[1:-1], text))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class Speaker:
    """A model that generates, and what it needs to."""

    model: BitMar
    memory: MemoryState
    tokenizer: TextTokenizer
    limit: int  # of a prompt and what follows it, in tokens


def speaker(path: Path) -> Speaker:
    """Of a run, a checkpoint, an exported directory or a packed file.

    Raises ConfigError, CheckpointError, DataError.
    """
    if path.is_file():
        model, memory = load_packed(path)
        return Speaker(model, memory, TextTokenizer(packed_tokenizer(path)), int(read_header(path)["row_tokens"]))
    loaded = load_trained(path)
    tokenizer = TextTokenizer(loaded.tokenizer)
    return Speaker(freeze(loaded.model), loaded.memory, tokenizer, loaded.config.data.row_tokens)


def texts_of(speaker: Speaker, known: argparse.Namespace) -> list[str]:
    """Raises ConfigError, DataError, OSError."""
    require(known.count > 0, f"--count must be > 0, got {known.count}")
    tokenizer, model, limit = speaker.tokenizer, speaker.model, speaker.limit
    prompt = [BOS, *tokenizer.encode_batch([known.prompt]).tokens.tolist()]
    vectors = vectors_of(known.vector, model.config.vision_encoder_dim)
    count = known.count * (1 if vectors is None else len(vectors))
    if vectors is not None:
        vectors = vectors.repeat_interleave(known.count, 0)
    sampling = Sampling(
        known.max_tokens, known.temperature, known.top_k, known.top_p, known.beams, known.length_penalty, known.seed
    )
    memory = memory_of(speaker, known.memory)
    require(len(prompt) < limit, f"the prompt has {len(prompt) - 1} tokens: this model was trained on rows of {limit}")
    if known.write_episode is not None:
        require(
            vectors is not None and known.prompt and count == 1, "--write_episode needs one --vector and a --prompt"
        )
        memory, (slot,) = remember(model, memory, [prompt], vectors)  # type: ignore[arg-type]
        save_memory(memory, known.write_episode)
        print(f"remembered in slot {slot}: {known.write_episode}", file=sys.stderr)
    found = generate(model, memory, [prompt] * count, vectors, sampling, limit)
    return [known.prompt + tokenizer.decode(text.tokens) for text in found]


def vectors_of(path: Path | None, width: int) -> torch.Tensor | None:
    """[N, V] fp32; raises ConfigError for vectors of another width."""
    array = read_vector(path)
    if array is None:
        return None
    vectors = torch.from_numpy(np.atleast_2d(array).astype(np.float32))
    check_vectors(vectors, len(vectors), width)
    return vectors


def memory_of(speaker: Speaker, choice: str) -> MemoryState:
    """The memory that is read: the checkpoint's (on), an empty one (off), or that of a file."""
    if choice == "off":
        return MemoryState.empty(speaker.model.config.memory_size, speaker.model.config.episode_dim)
    return speaker.memory if choice == "on" else load_memory(Path(choice), speaker.model)


if __name__ == "__main__":
    sys.exit(main())
