"""The page: what is chosen on the left, what the model writes, looks at and remembers on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from gradio.themes import Default

from bitmar.generation.sampling import Sampling
from bitmar.observability.drawing import shortened
from shards.tokenizer import EOS
from tools.demo_page.pairs import Pair, own_vector
from tools.demo_page.pictures import image_picture, memory_picture, recall_picture
from tools.demo_page.session import Demo, Recalled, SessionMemory, Word

HELD_OUT, OWN, NONE = "held-out pair", "own vector", "none"
MEAN = "mean over heads and layers"
NO_HEAD = "No head is chosen: choose one, or the mean."
T = TypeVar("T")
STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
SEEDS = 1 << 31  # how many there are
# of every listener: answers come at once, and no two are made at the same time, as neither the tokenizer's memory of
# words nor matplotlib's settings stand it
LISTENER: dict[str, Any] = {"show_progress": "hidden", "concurrency_id": "model", "concurrency_limit": 1}
_LETTERS = 90  # of a caption in the list of pairs
_HOUR_S = 3600  # after which a session that was left is forgotten, and its uploads removed


class Page:
    """The page's functions, by the components that call them. All that changes is in the browser session's state."""

    def __init__(self, demo: Demo, pairs: Sequence[Pair]) -> None:
        self._demo, self._pairs = demo, pairs
        self._heads = {MEAN: None} | {
            f"layer {layer}, head {head}": (layer, place)
            for layer, heads in enumerate(demo.heads)
            for place, head in enumerate(heads)
        }

    def chosen(self, source: str, number: int | None, file: str | None) -> Pair | None:
        """The image that is chosen; None: none."""
        if source == NONE:
            return None
        if source == HELD_OUT:
            return self._pairs[given(number, "No pair is chosen: choose one by its caption, or no image.")]
        file = given(file, "No file: give a .npy of one image vector.")
        return own_vector(Path(file), self._demo.config.vision_encoder_dim)

    def generate(
        self,
        source: str,
        number: int | None,
        file: str | None,
        prompt: str,
        temperature: float | None,
        top_p: float | None,
        seed: int | None,
        remembers: bool,
        memory: SessionMemory,
        head: str | None,
    ) -> Iterator[tuple[Any, ...]]:
        """Caption (token by token), the picture of the image, that of the memory, the words."""
        with mistakes_shown():
            pair, head = self.chosen(source, number, file), given(head, NO_HEAD)
            heat = given(temperature, "The temperature is empty: give a number from 0 to 2.")
            nucleus = given(top_p, "Top-p is empty: give a number up to 1.") if heat > 0 else 1.0
            seed = given(seed, f"The seed is empty: give a whole number from 0 to {SEEDS - 1}.")
            sampling = Sampling(None, heat, None, nucleus, seed=seed)
            used = memory if remembers else self._demo.empty_memory()
            words: list[Word] = []
            for word in self._demo.write(used, None if pair is None else pair.vector, prompt, sampling):
                words.append(word)
                yield self._caption(words, True), gr.skip(), gr.skip(), words
            episodes = memory.episodes if remembers else {}
            yield self._caption(words), *self._pictures(words, head, episodes), words

    def redraw(self, head: str | None, words: list[Word]) -> str:
        """The picture of the image for another head."""
        place = self._heads[given(head, NO_HEAD)]
        return picture(image_picture(words, place), "attention to the image") if words else ""

    def remember(
        self, source: str, number: int | None, file: str | None, caption: str, memory: SessionMemory
    ) -> tuple[SessionMemory, str, str]:
        """The memory with the pair in it, what is told of it, and the message."""
        with mistakes_shown():
            pair = self.chosen(source, number, file)
            pair = given(pair, "An episode is an image with its caption: choose an image.")
            memory, slot = self._demo.remember(memory, pair.vector, caption, pair.key)
            blended = ", blended into the episode of this image that it held" if memory.episodes[slot].blended else ""
            message = f"Written to <b>slot {slot}</b>{blended}: “{escape(caption)}”"
            return memory, self.table(memory), message

    def recall(
        self, source: str, number: int | None, file: str | None, remembers: bool, memory: SessionMemory
    ) -> tuple[str, str, str]:
        """What the memory hands back, its picture, and the caption that is written by it alone."""
        with mistakes_shown():
            pair = self.chosen(source, number, file)
            pair = given(pair, "The image alone is to ask the memory: choose an image.")
            used = memory if remembers else self._demo.empty_memory()
            recalled = self._demo.recall(used, pair.vector)
            words = list(self._demo.write(used, pair.vector, "", Sampling(), by_image=True))
            shown = picture(recall_picture(recalled, used.episodes), "slots that the image recalls")
            heading = "<h3>Written with what the image recalls, the image itself unseen</h3>"
            return self._handed_back(recalled, used), shown, heading + self._caption(words)

    def table(self, memory: SessionMemory) -> str:
        """How full the memory is, and the episodes of this session."""
        slots = len(memory.state.written)
        rows = "".join(
            f"<tr><td>{slot}<td>{escape(episode.caption)}<td>{escape(episode.key or 'own vector')}"
            for slot, episode in sorted(memory.episodes.items())
        )
        written = f"{memory.used} of {slots} slots hold an episode, {len(memory.episodes)} of them of this session."
        return f"<p>{written}</p>" + (f"<table><tr><th>slot<th>caption<th>pair{rows}</table>" if rows else "")

    def pair_card(self, source: str, number: int | None) -> tuple[str, str]:
        """What is told of a held-out pair, and its caption for an episode."""
        if source != HELD_OUT or number is None:
            return "", ""
        pair = self._pairs[number]
        return f"<p>“{escape(pair.caption)}”</p><small>pair {escape(pair.key)}</small>", pair.caption

    def _caption(self, words: Sequence[Word], goes_on: bool = False) -> str:
        """The prompt in grey, the words that were written behind it."""
        given = self._demo.text([word for word in words if word.given])
        whole = self._demo.text(list(words))
        ended = bool(words) and words[-1].token == EOS
        mark = "" if goes_on else "<small>ended by itself</small>" if ended else "<small>as long as a row</small>"
        return (
            f'<p class="caption" data-done="{int(not goes_on)}"><span class="given">{escape(given)}</span>'
            f"<span>{escape(whole[len(given) :])}</span></p>{mark}"
        )

    def _pictures(self, words: list[Word], head: str, episodes: Any) -> tuple[str, str]:
        return self.redraw(head, words), picture(memory_picture(words, episodes), "attention to the memory")

    def _handed_back(self, recalled: Recalled, memory: SessionMemory) -> str:
        best = recalled.best(1)
        if not best:
            return "<p>The memory hands back nothing: it is off or empty.</p>"
        nothing = "" if recalled.nothing is None else f" <small>nothing: {recalled.nothing:.1%}</small>"
        weight = f"{recalled.weights[best[0]]:.1%}"
        episode = memory.episodes.get(best[0])
        what = f"“{escape(episode.caption)}”" if episode else "an episode of the training, whose caption is not kept"
        return f"<p>The image recalls <b>slot {best[0]}</b> with weight <b>{weight}</b>: {what}{nothing}</p>"

    def build(self) -> gr.Blocks:
        """The page, for `show`."""
        demo = self._demo
        title = f"BitMar: {demo.run}, step {demo.step:,}"
        with gr.Blocks(analytics_enabled=False, title=title, fill_width=True, delete_cache=(_HOUR_S, _HOUR_S)) as page:
            memory = gr.State(demo.memory_at_start(), time_to_live=_HOUR_S)
            words = gr.State([], time_to_live=_HOUR_S)
            gr.HTML(f"<h1>{escape(title)}</h1>{self._about()}", elem_id="title")
            with gr.Row(equal_height=False):
                with gr.Column(scale=4, min_width=340):
                    source, number, file, card = self._image_inputs()
                    prompt = gr.Textbox(label="Prompt (may be empty)", elem_id="prompt", lines=1)
                    with gr.Row():
                        temperature = gr.Slider(
                            0, 2, 0, step=0.05, label="Temperature", elem_id="temperature", info="0: likeliest"
                        )
                        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="with a temperature")
                    with gr.Row():
                        seed = gr.Number(
                            0, label="Seed", precision=0, minimum=0, maximum=SEEDS - 1, min_width=90, elem_id="seed"
                        )
                        remembers = gr.Checkbox(True, label="Read the memory", elem_id="memory", min_width=150)
                    start = gr.Button("Write a caption", variant="primary", elem_id="generate")
                with gr.Column(scale=9, min_width=560), gr.Tabs():
                    with gr.Tab("Caption and attention", id="caption"):
                        written = gr.HTML(elem_id="written")
                        head = gr.Dropdown(
                            list(self._heads), value=MEAN, label="Attention to the image", elem_id="head"
                        )
                        image = gr.HTML(elem_id="image-attention")
                        gr.HTML("<h3>Attention to the memory</h3>")
                        slots = gr.HTML(elem_id="memory-attention")
                    with gr.Tab("Memory: write and recall", id="episodes"):
                        parts = self._memory_parts(memory)
            chosen = [source, number, file]
            for component in (source, number):
                component.change(self.pair_card, [source, number], [card, parts["caption"]], **LISTENER)
            settings = [*chosen, prompt, temperature, top_p, seed, remembers, memory, head]
            gr.on([start.click, prompt.submit], self.generate, settings, [written, image, slots, words], **LISTENER)
            head.input(self.redraw, [head, words], image, **LISTENER)
            told_of = [memory, parts["table"], parts["message"]]
            answers = [parts[name] for name in ("answer", "picture", "recalled")]
            parts["write"].click(self.remember, [*chosen, parts["caption"], memory], told_of, **LISTENER)
            parts["recall"].click(self.recall, [*chosen, remembers, memory], answers, **LISTENER)
            for name, made in (("reset", demo.memory_at_start), ("empty", demo.empty_memory)):
                parts[name].click(lambda made=made: self._anew(made()), None, [*told_of, *answers], **LISTENER)
        return page

    def _anew(self, memory: SessionMemory) -> tuple[Any, ...]:
        """That memory, what is told of it, and no message or answer of the one before."""
        return memory, self.table(memory), "", "", "", ""

    def _about(self) -> str:
        config = self._demo.config
        sizes = f"{config.vision_tokens} vision tokens, {config.memory_size} memory slots"
        return f"<small>{len(self._pairs)} held-out pairs to choose among; {sizes}</small>"

    def _image_inputs(self) -> tuple[gr.Radio, gr.Dropdown, gr.File, gr.HTML]:
        source = gr.Radio([HELD_OUT, OWN, NONE], value=HELD_OUT, label="Image", elem_id="source")
        labels = [(shortened(pair.caption, _LETTERS), place) for place, pair in enumerate(self._pairs)]
        number = gr.Dropdown(
            labels,
            value=0,
            label="Its caption",
            info="Shards hold the image's vector, not the image: it cannot be shown.",
            elem_id="pair",
        )
        card = gr.HTML(self.pair_card(HELD_OUT, 0)[0], elem_id="card")
        file = gr.File(label="A .npy of one vector", file_types=[".npy"], visible=False, height=110, elem_id="file")
        source.change(
            lambda source: [gr.update(visible=source == HELD_OUT)] * 2 + [gr.update(visible=source == OWN)],
            source,
            [number, card, file],
            **LISTENER,
        )
        return source, number, file, card

    def _memory_parts(self, memory: gr.State) -> dict[str, Any]:
        gr.HTML(
            "<p>The chosen image with a caption, shown to the model once. The memory is this browser session's own: it "
            "begins as the checkpoint's, and never goes to disk.</p>"
        )
        parts: dict[str, Any] = {}
        with gr.Row(equal_height=False, elem_classes="ends"):
            parts["caption"] = gr.Textbox(
                self.pair_card(HELD_OUT, 0)[1], label="Caption of the episode", elem_id="episode", scale=4
            )
            parts["write"] = gr.Button("Write the episode", variant="primary", elem_id="write", min_width=140)
        parts["message"] = gr.HTML(elem_id="message")
        parts["table"] = gr.HTML(self.table(memory.value), elem_id="episodes")
        with gr.Row():
            parts["recall"] = gr.Button("Recall by the image alone", variant="primary", elem_id="recall", scale=2)
            parts["empty"] = gr.Button("Empty the memory", elem_id="empty", scale=2)
            parts["reset"] = gr.Button("Back to the checkpoint's", elem_id="reset", scale=2)
        parts["answer"] = gr.HTML(elem_id="answer")
        parts["recalled"] = gr.HTML(elem_id="recalled")
        parts["picture"] = gr.HTML(elem_id="recall-picture")
        return parts


@contextmanager
def mistakes_shown() -> Iterator[None]:
    """A person's mistake comes up on the page, in a line."""
    try:
        yield
    except (ValueError, OSError, EOFError) as error:
        raise gr.Error(escape(" ".join(str(error).split())), print_exception=False) from None


def given(value: T | None, complaint: str) -> T:
    """What a field holds; the complaint comes up on the page where it is empty."""
    if value is None:
        raise gr.Error(complaint, print_exception=False)
    return value


def picture(url: str, shows: str) -> str:
    return f'<img src="{url}" alt="{shows}">'


def show(page: gr.Blocks, host: str, port: int) -> str:
    """Serve the page, from threads of its own; gives its address."""
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=STYLE,
    )
    return address
