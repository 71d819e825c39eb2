"""`python -m tools.docs.diagrams`: writes the pictures of docs/diagrams from the code; a contract test compares them.

Text stands on filled boxes only, so every picture is legible on a light and on a dark page.
"""

from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from ropeway.config.stages import STAGES, StageSpec
from ropeway.data.loss_mask import loss_mask
from ropeway.models.chat_template import OpenAssistantTemplate

FOLDER = Path(__file__).parents[2] / "docs" / "diagrams"
BLUE, VIOLET, GREEN, GRAY, AMBER = "#24557f", "#5d4a8c", "#2f6b4a", "#565c66", "#8a5a12"
_LINE = "#8a8f98"
_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_LINE_CHARACTERS = 32  # of 12 px in the boxes of the stages
_PITCH = 17  # height of a line of text, in pixels


@dataclass(frozen=True, slots=True)
class Box:
    """A filled box with a title and lines of text; x and y are its upper left corner, in pixels."""

    x: int
    y: int
    width: int
    height: int
    title: str
    lines: tuple[str, ...] = ()
    color: str = BLUE

    @property
    def middle(self) -> int:
        """Return x of the center."""
        return self.x + self.width // 2

    @property
    def center(self) -> int:
        """Return y of the center."""
        return self.y + self.height // 2

    def draw(self) -> str:
        """Return the box as SVG."""
        top = self.center - _PITCH * len(self.lines) / 2 + 5
        parts = [
            f'<rect x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="6" fill="{self.color}"/>',
            f'<text x="{self.middle}" y="{top:g}" font-weight="600" font-size="14">{escape(self.title)}</text>',
        ]
        parts += [
            f'<text x="{self.middle}" y="{top + _PITCH * number:g}" font-size="12">{escape(line)}</text>'
            for number, line in enumerate(self.lines, start=1)
        ]
        return "\n".join(parts)


def arrow(*points: tuple[int, int], dashed: bool = False) -> str:
    """Return a line through these points with a head at the last one."""
    path = " ".join(f"{'M' if at == 0 else 'L'}{x} {y}" for at, (x, y) in enumerate(points))
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{_LINE}" stroke-width="2"{dash} marker-end="url(#head)"/>'


def down(upper: Box, lower: Box) -> str:
    """Return an arrow from the bottom of one box to the top of the next."""
    return arrow((upper.middle, upper.y + upper.height), (lower.middle, lower.y - 2))


def right(one: Box, other: Box) -> str:
    """Return an arrow from the right side of a box to the left side of another, bent if they differ in height."""
    start, end = (one.x + one.width, one.center), (other.x - 2, other.center)
    bend = (start[0] + end[0]) // 2
    return arrow(start, end) if start[1] == end[1] else arrow(start, (bend, start[1]), (bend, end[1]), end)


def picture(width: int, height: int, label: str, *parts: str | Box) -> str:
    """Return an SVG document; boxes are drawn over lines."""
    lines = [part for part in parts if isinstance(part, str)]
    boxes = [part.draw() for part in parts if isinstance(part, Box)]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(label)}" font-family="{_FONT}" text-anchor="middle" fill="#ffffff">'
    )
    marker = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{_LINE}"/></marker></defs>'
    )
    return "\n".join([head, marker, *lines, *boxes, "</svg>\n"])


def stage_edges(stages: tuple[StageSpec, ...] = STAGES) -> set[tuple[str, str]]:
    """Return (stage, later stage that reads its outputs), without the pairs that a longer path already connects."""
    writers = {
        path.partition("/")[0]: stage.name
        for stage in stages
        for path in (*stage.outputs, *stage.metrics, *stage.plots)
    }
    direct = {stage.name: {writers[path.partition("/")[0]] for path in stage.inputs} for stage in stages}

    def reaches(name: str) -> set[str]:
        return direct[name].union(*(reaches(earlier) for earlier in direct[name]))

    return {
        (earlier, stage)
        for stage, inputs in direct.items()
        for earlier in inputs
        if not any(earlier in reaches(other) for other in inputs - {earlier})
    }


# Column (0 to 2) and row of each stage in the picture; a new stage needs a place here.
_PLACES = {
    "fetch": (1, 1), "base": (1, 2), "tokenize": (1, 3), "prepare": (1, 4), "report_data": (2, 5), "train": (1, 5),
    "evaluate": (1, 6), "report_eval": (2, 7), "package": (1, 7), "report_package": (2, 8),
}  # fmt: skip


def draw_stages() -> str:
    """Return the stages of dvc.yaml with their outputs, and what is before and after them."""
    left, width, height, pitch = (20, 270, 540), 220, 58, 84

    def place(column: int, row: int, title: str, lines: tuple[str, ...], color: str) -> Box:
        return Box(left[column], 16 + row * pitch, width, height, title, lines, color)

    boxes = {}
    for stage in STAGES:
        folders = [f"{one}/" if "." not in one else one for one in (*stage.outputs, *stage.metrics, *stage.plots)]
        color = VIOLET if stage.name.startswith("report_") else BLUE
        half = (len(folders) + 1) // 2 if len(", ".join(folders)) > _LINE_CHARACTERS else len(folders)
        lines = tuple(", ".join(part) for part in (folders[:half], folders[half:]) if part)
        boxes[stage.name] = place(*_PLACES[stage.name], stage.name, lines, color)
    identity = place(1, 0, "identity", ("freezes inputs in .identity/",), GRAY)
    params = place(0, 0, "params.yaml", ("one block per run",), GRAY)
    checkpoints = place(0, 5, ".checkpoints/", ("every save_steps, outside DVC",), GRAY)
    publish = place(1, 9, "publish", ("task of the flow, with the gate",), GREEN)
    registry = place(1, 10, "registry", ("version, alias candidate",), GREEN)
    lines = [right(params, identity), down(identity, boxes["fetch"]), down(boxes["package"], publish)]
    lines += [down(publish, registry), arrow((270, checkpoints.center), (242, checkpoints.center))]
    pages = boxes["report_package"]
    lines += [arrow((pages.middle, pages.y + height), (pages.middle, publish.center), (492, publish.center))]
    for earlier, later in sorted(stage_edges()):
        one, other = boxes[earlier], boxes[later]
        if one.x == other.x:
            lines.append(down(one, other))
        elif one.y > boxes["evaluate"].y:  # what is beside it is in the way: below it, then to the right
            lines.append(arrow((one.middle, other.center), (other.x - 2, other.center)))
        else:
            side = (other.middle, other.y - 2)
            lines.append(arrow((one.x + one.width, one.center), (other.middle, one.center), side))
    label = "Stages of dvc.yaml from top to bottom, with the files that each one writes"
    return picture(
        780, 16 + 11 * pitch, label, *lines, *boxes.values(), identity, params, checkpoints, publish, registry
    )


def draw_reruns() -> str:
    """Return what a stage's dependencies are and what DVC does with them."""
    inputs = [
        Box(20, 16, 300, 56, "code-STAGE.json", ("syntax trees of its package and imports",)),
        Box(20, 84, 300, 56, "params-STAGE.json", ("values of the keys that it reads",)),
        Box(20, 152, 300, 56, "frozen files", ("DeepSpeed JSON, prompts, tasks",)),
        Box(20, 220, 300, 56, "identity of sources and base", ("sha256, ETag, Hub commit, version",)),
        Box(20, 288, 300, 56, "outputs of earlier stages", ("by content",)),
    ]
    compare = Box(370, 152, 150, 56, "DVC compares", ("with dvc.lock",), GRAY)
    ends = [
        Box(570, 60, 190, 56, "equal", ("stage is skipped",), GREEN),
        Box(570, 152, 190, 56, "in the run-cache", ("outputs are restored",), GREEN),
        Box(570, 244, 190, 56, "neither", ("stage runs",), AMBER),
    ]
    lines = [*(right(one, compare) for one in inputs), *(right(compare, one) for one in ends)]
    return picture(780, 360, "What a stage depends on, and when DVC runs it", *lines, *inputs, compare, *ends)


def draw_ledger() -> str:
    """Return where records, sequences and tokens go."""
    read = Box(20, 130, 120, 52, "read", ("records",))
    kept = Box(180, 90, 130, 52, "kept", ("→ sequences",))
    refused = Box(180, 170, 130, 52, "refused", ("counted by reason",), AMBER)
    parts = [
        Box(350, 16, 160, 44, "train", (), BLUE),
        Box(350, 68, 160, 44, "validation", (), BLUE),
        Box(350, 120, 160, 44, "unused", ("over max_val_set",), GRAY),
        Box(350, 172, 160, 44, "duplicate", ("if removed",), AMBER),
        Box(350, 224, 160, 44, "contaminated", ("if removed",), AMBER),
    ]
    ends = [
        Box(570, 16, 190, 44, "tokens in rows", ("plus padding = cells",), BLUE),
        Box(570, 68, 190, 44, "lost to windows", (), GRAY),
        Box(570, 120, 190, 44, "lost to cuts", (), GRAY),
        Box(570, 172, 190, 44, "not drawn", ("fraction, size",), GRAY),
    ]
    lines = [right(read, kept), right(read, refused), *(right(kept, one) for one in parts)]
    lines += [right(parts[0], one) for one in ends]
    return picture(
        780, 284, "The ledger: every record and token is in one box", *lines, read, kept, refused, *parts, *ends
    )


def learned_tokens(tokens: list[str], **settings: object) -> list[bool]:
    """Return which tokens of a conversation are in the loss: those that a position predicts that counts."""
    template = OpenAssistantTemplate()
    names = sorted({*tokens, *template.added_tokens})
    ids = {name: number for number, name in enumerate(names)}
    kinds = template.speakers(np.array([ids[token] for token in tokens]), None, ids=ids)
    profile = SimpleNamespace(document_end="masked", **settings)
    mask = loss_mask(kinds, profile)  # type: ignore[arg-type]
    return [False, *(bool(one) for one in mask[:-1])]


CONVERSATION = ["<s>", "<|system|>", "Be", "brief.", "</s>", "<|prompter|>", "Hi", "</s>", "<|assistant|>", "Hello",
                "there", "</s>"]  # fmt: skip
MASKS: dict[str, dict[str, object]] = {
    "what_counts: published": {"label_masking": True, "what_counts": "published"},
    "what_counts: answers": {"label_masking": True, "what_counts": "answers"},
    "label_masking: false": {"label_masking": False, "what_counts": "published"},
}


def draw_loss_mask() -> str:
    """Return one conversation under each setting, filled where a token is learned."""
    parts: list[str | Box] = []
    for row, (title, settings) in enumerate(MASKS.items()):
        top, x = 16 + row * 76, 16
        parts.append(Box(16, top, 200, 24, title, (), GREEN))
        for token, learned in zip(CONVERSATION, learned_tokens(CONVERSATION, **settings), strict=True):
            width = 16 + 8 * len(token)
            parts.append(Box(x, top + 30, width, 28, token, (), BLUE if learned else GRAY))
            x += width + 3
    parts += [Box(16, 248, 90, 24, "learned"), Box(112, 248, 90, 24, "read only", (), GRAY)]
    return picture(880, 288, "Which tokens of a conversation are in the loss", *parts)


def draw_checkpoints() -> str:
    """Return a run with a kill and a rewind, on the axis of optimizer steps."""
    first = [
        Box(16, 16, 174, 52, "step 0", ("warm-up step, disk check",), GRAY),
        Box(220, 16, 110, 52, "step 20", ("checkpoint",)),
        Box(380, 16, 110, 52, "step 40", ("checkpoint",)),
        Box(540, 16, 110, 52, "step 53", ("kill -9",), AMBER),
    ]
    again = [
        Box(380, 100, 110, 52, "resume", ("from step 40",), GREEN),
        Box(540, 100, 110, 52, "step 60", ("checkpoint",)),
        Box(690, 100, 120, 52, "step 71", ("loss spikes",), AMBER),
    ]
    rewind = [
        Box(540, 184, 110, 52, "rewind", ("to step 60",), GREEN),
        Box(690, 184, 120, 52, "step 61 …", ("rows left out",)),
    ]
    chains = (first, again, rewind)
    lines = [right(one, other) for chain in chains for one, other in pairwise(chain)]
    lines += [arrow((595, 68), (595, 84), (435, 84), (435, 98)), arrow((750, 152), (750, 168), (595, 168), (595, 182))]
    return picture(830, 252, "A run that is killed, resumed and rewound", *lines, *first, *again, *rewind)


def draw_registry() -> str:
    """Return the way of a package to production."""
    package = Box(20, 100, 140, 52, "package/", ("and pages/",))
    version = Box(190, 100, 170, 52, "version laptop@v3", ("immutable, by digest",), GREEN)
    gate = Box(390, 100, 120, 52, "gate", ("metrics compared",), GRAY)
    candidate = Box(560, 40, 180, 52, "alias candidate", ("passed",), GREEN)
    rejected = Box(560, 160, 180, 52, "no alias moves", ("not passed",), AMBER)
    review = Box(560, 240, 180, 52, "review", ("a person, --approve",), GRAY)
    production = Box(200, 240, 310, 52, "alias production", ("only a clean commit; append-only log",), GREEN)
    lines = [right(package, version), right(version, gate), right(gate, candidate), right(gate, rejected)]
    lines += [arrow((740, 66), (766, 66), (766, 266), (742, 266)), arrow((560, 266), (512, 266))]
    boxes = (package, version, gate, candidate, rejected, review, production)
    return picture(780, 308, "From a package to production", *lines, *boxes)


PICTURES = {
    "stages": draw_stages,
    "reruns": draw_reruns,
    "ledger": draw_ledger,
    "loss-mask": draw_loss_mask,
    "checkpoints": draw_checkpoints,
    "registry": draw_registry,
}


def main() -> None:
    """Write every picture."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
