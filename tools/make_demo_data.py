"""Write a small GENERATED raw data set in BabyLM's layout: captions, vectors and text that belong together.

A scene is a set of attributes drawn at random. Its vector is the sum of a fixed random direction an
attribute plus noise, scaled to DINOv2's size (norm about 48, spread about 1.74); its captions name the
attributes. So an image tells a small language model much that the words before do not.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from shards.raw import GENERATED_MARK, TEXT_ARCHIVE, TEXT_MEMBERS
from shards.record import VECTOR_SIZE, DataError

PARAMETERS = "generated.json"
NORM = 48.0
NOISE = 0.25  # of an attribute direction's own spread
LINE_BREAK = "\n"
ZIP_TIME = (1980, 1, 1, 0, 0, 0)
TEXT_SHARES = (0.09, 0.30, 0.26, 0.18, 0.12, 0.05)  # of TEXT_MEMBERS


def listed(words: str) -> tuple[str, ...]:
    """The words of a string."""
    return tuple(words.split())


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "number": listed("one two three four five several"),
    "size": listed("small large tiny huge tall short thin round"),
    "colour": listed("red blue green yellow black white brown grey orange purple pink golden silver"),
    "object": listed(
        "dog cat horse bird cow sheep boy girl man woman child farmer car bus truck train boat bicycle ball kite "
        "chair table lamp clock bottle cup cake apple tree flower house bridge tower tent piano guitar"
    ),
    "action": listed("standing resting waiting moving falling turning shining leaning hiding rolling floating leaving"),
    "place": listed(
        "beach street park forest kitchen garden field river market station school mountain lake bedroom roof "
        "desert harbour museum stadium playground"
    ),
    "weather": listed("sunny rainy snowy cloudy windy foggy"),
    "other": listed(
        "fence wall bench rock sign ladder basket blanket box bucket flag rope wagon statue fountain mirror"
    ),
    "relation": ("near", "behind", "beside", "under", "above", "in front of"),
}
SHORT = (
    "{number} {size} {colour} {object} {action} in the {place} .",
    "a photo of {number} {colour} {object} {relation} a {other} .",
    "{number} {object} {action} {relation} the {other} on a {weather} day .",
    "in the {place} there is {number} {size} {object} .",
    "the {colour} {object} is {action} {relation} a {other} in the {place} .",
)
LONG = (
    "in this picture i can see {number} {size} {colour} {object} {action} {relation} a {other} , "
    "and in the background there is a {place} on a {weather} day .",
    "this is a {weather} day in the {place} . there is a {other} , and {relation} it {number} {colour} "
    "{object} is {action} , looking very {size} .",
    "the image shows a {place} . we see {number} {object} which is {size} and {colour} , {action} {relation} "
    "the {other} under a {weather} sky .",
)
NOUNS = listed(
    "friend mother father brother sister teacher doctor driver singer painter king queen soldier sailor baker "
    "village city road path door window floor stone sand water fire wind rain snow cloud star moon sun night "
    "morning evening summer winter story song book letter picture word name voice hand foot head eye ear face "
    "coat hat shoe shirt pocket bag knife spoon plate bread milk butter cheese egg fish meat soup salt sugar "
    "corn wheat grass leaf branch root seed hill valley island shore wave ship sail wheel engine hammer nail "
    "wood iron glass paper thread cloth game race team war peace law money shop price work day week year"
)
VERBS = listed(
    "watch follow help find carry push pull lift open close paint clean wash fix break build cover count call "
    "answer ask teach visit meet know remember forget want need like love fear hear touch hold keep leave bring "
    "send show hide catch kick throw cook eat drink taste smell sell trade lend share guard chase draw read "
    "praise warn thank greet trust wake join climb cross pass reach enter save burn melt shake lock load"
)
ADJECTIVES = listed(
    "old young new good bad kind proud quiet loud quick slow warm cold dry wet soft hard sharp sweet bitter clean "
    "dirty bright dark deep wide narrow heavy light strong weak rich poor brave calm clever strange plain fresh "
    "empty gentle lazy busy happy sad angry tired hungry careful lonely famous simple honest rough smooth"
)
FUNCTION_WORDS = listed("the a some every this that one another")
JOINERS = listed("and but so because while when")


def inflected(verb: str) -> tuple[str, str]:
    """A verb after a singular and after an auxiliary."""
    if verb.endswith(("ch", "sh", "ss", "x")):
        return f"{verb}es", f"must {verb}"
    return (f"{verb[:-1]}ies" if verb.endswith("ry") else f"{verb}s"), f"must {verb}"


class Words:
    """The vocabulary of the text: nouns, verbs and adjectives, drawn by Zipf's law."""

    def __init__(self, rng: np.random.Generator) -> None:
        nouns = [*ATTRIBUTES["object"], *ATTRIBUTES["other"], *NOUNS]
        compounds = [first + second for first, second in itertools.product(NOUNS, nouns) if first != second]
        rare = rng.permutation(len(compounds))[:1200].tolist()
        self.nouns = [*nouns, *[compounds[number] for number in rare]]
        self.verbs = [form for verb in VERBS for form in inflected(verb)]
        made = [f"{prefix}{adjective}" for prefix in ("un", "over", "half-") for adjective in ADJECTIVES]
        self.adjectives = [*ATTRIBUTES["colour"], *ADJECTIVES, *made]
        self._rng = rng

    def pick(self, words: Sequence[str]) -> str:
        """One word, the k-th about 1 / (k + 10) as often as the first."""
        rank = int(10 * ((1 + len(words) / 10) ** self._rng.random() - 1))
        return words[min(rank, len(words) - 1)]

    def phrase(self) -> str:
        """A noun phrase."""
        article = self.pick(FUNCTION_WORDS)
        if self._rng.random() < 0.4:
            return f"{article} {self.pick(self.adjectives)} {self.pick(self.nouns)}"
        return f"{article} {self.pick(self.nouns)}"

    def sentence(self) -> str:
        """A sentence of one or two clauses, without its full stop."""
        clause = f"{self.phrase()} {self.pick(self.verbs)} {self.phrase()}"
        if self._rng.random() < 0.3:
            clause += f" {self.pick(JOINERS)} {self.phrase()} {self.pick(self.verbs)}"
        if self._rng.random() < 0.3:
            clause += f" in the {self.pick(ATTRIBUTES['place'])}"
        return clause


def childes(words: Words, rng: np.random.Generator) -> str:
    """A turn of a child's conversation."""
    speaker = ("*MOT:", "*CHI:", "*FAT:")[int(rng.integers(3))]
    text = words.sentence() if rng.random() < 0.6 else words.phrase()
    return f"{speaker}\t{text}{'?' if rng.random() < 0.3 else '.'}\n"


def switchboard(words: Words, rng: np.random.Generator) -> str:
    """A turn of a telephone conversation."""
    return f"{'AB'[int(rng.integers(2))]}:\t{'Uh, ' if rng.random() < 0.2 else ''}{words.sentence()}.\n"


def subtitle(words: Words, rng: np.random.Generator) -> str:
    """A line of a film."""
    return f"{'- ' if rng.random() < 0.3 else ''}{words.sentence().capitalize()}.\n"


def article(words: Words, rng: np.random.Generator) -> str:
    """A headed article of a few paragraphs."""
    title = f"{words.pick(words.adjectives)} {words.pick(words.nouns)}".title()
    paragraphs = [prose(words, rng) for _ in range(int(rng.integers(1, 5)))]
    return f"= = = {title} = = =\n\n{''.join(paragraphs)}\n"


def prose(words: Words, rng: np.random.Generator) -> str:
    """A line of several sentences."""
    sentences = [words.sentence().capitalize() + "." for _ in range(int(rng.integers(2, 7)))]
    return " ".join(sentences) + LINE_BREAK


MAKERS: tuple[Callable[[Words, np.random.Generator], str], ...] = (
    subtitle,
    childes,
    article,
    subtitle,
    article,
    switchboard,
)


def write_text(path: Path, seed: int, words: int) -> None:
    """The archive of the six text files, about `words` words in all; fixed timestamps."""
    vocabulary = Words(np.random.default_rng([seed, 1]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (stem, share, make) in enumerate(zip(TEXT_MEMBERS, TEXT_SHARES, MAKERS, strict=True)):
            rng = np.random.default_rng([seed, 2, number])
            pieces: list[str] = []
            count = 0
            while count < words * share:
                pieces.append(make(vocabulary, rng))
                count += len(pieces[-1].split())
            entry = zipfile.ZipInfo(f"{stem}.train", ZIP_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3
            archive.writestr(entry, "".join(pieces))


def scene_vectors(seed: int, scenes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float32 [N, V]: the vector of each scene, int64 [N, attributes]; the directions depend on seed alone."""
    directions = np.random.default_rng([seed, 3])
    total = directions.standard_normal(VECTOR_SIZE) * 1.3  # what all images share
    vectors = np.tile(total, (len(scenes), 1))
    for column, values in enumerate(ATTRIBUTES.values()):
        table = directions.standard_normal((len(values), VECTOR_SIZE))
        vectors += table[scenes[:, column]]
    vectors += NOISE * np.sqrt(len(ATTRIBUTES)) * rng.standard_normal(vectors.shape)
    vectors *= NORM / np.linalg.norm(vectors, axis=1).mean()
    return vectors.astype("<f4")


def write_pairs(
    directory: Path, name: str, seed: Sequence[int], counts: tuple[int, int], templates: Sequence[str], halves: bool
) -> None:
    """One NAME of captions and vectors; `counts` are (images, captions), images in turn get a caption."""
    images, captions = counts
    rng = np.random.default_rng(seed)
    scenes = np.stack([rng.integers(len(values), size=images) for values in ATTRIBUTES.values()], axis=1)
    vectors = scene_vectors(seed[0], scenes, rng)
    texts, rows = [], rng.permutation(np.arange(captions) % images)
    for row in rows.tolist():
        attributes = {key: values[scenes[row, column]] for column, (key, values) in enumerate(ATTRIBUTES.items())}
        texts.append(templates[int(rng.integers(len(templates)))].format(**attributes))
    (directory / f"{name}_captions.json").write_text(json.dumps(texts, indent=0) + "\n")
    whole = vectors[rows]
    cut = (captions * 13) // 25
    parts = {"_1of2": whole[:cut], "_2of2": whole[cut:]} if halves else {"": whole}
    for suffix, part in parts.items():
        buffer = io.BytesIO()
        np.save(buffer, part, allow_pickle=False)
        (directory / f"{name}_dino_v2_states{suffix}.npy").write_bytes(buffer.getvalue())


def make(out: Path, seed: int, images: int, words: int) -> bool:
    """Write the data set into `out`; False when it is there already with the same parameters.

    Raises DataError on bad parameters or an `out` that holds something else.
    """
    for option, value, least in (("--seed", seed, 0), ("--images", images, 10), ("--words", words, 100)):
        if value < least:
            raise DataError(f"{option} must be >= {least}, got {value}")
    told = json.dumps({"version": 1, "seed": seed, "images": images, "words": words}) + "\n"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        mark = out / PARAMETERS
        if mark.is_file() and mark.read_text() == told:
            return False
        raise DataError(f"{out} exists and holds other files or parameters: choose another --out or remove it")
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        narratives = images // 4
        first = images - narratives
        write_pairs(part, "cc_3M", [seed, 10], (first, first), SHORT, True)
        write_pairs(part, "local_narr", [seed, 11], (narratives, 3 * narratives), LONG, False)
        write_text(part / TEXT_ARCHIVE, seed, words)
        (part / GENERATED_MARK).write_text(
            "# Generated data\n\nEverything here is made up by `tools/make_demo_data.py` from random numbers "
            f"(seed {seed}, {images} images, {words} words). It has the layout of BabyLM's multimodal track and "
            "none of its content; numbers measured on it say nothing about real data.\n"
        )
        (part / PARAMETERS).write_text(told)
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 0, or 2 after a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory to make; reused when it is there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--words", type=int, default=150_000, help="words of text, about")
    args = parser.parse_args(arguments)
    try:
        made = make(args.out, args.seed, args.images, args.words)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: generated data {'written' if made else 'already there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
