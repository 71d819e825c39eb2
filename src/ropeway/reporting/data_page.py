"""What report.html shows: counts and samples of prepared data, for `templates/data.html.jinja`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ropeway.config.params import Profile
from ropeway.data.shards import Shards, SourceShards
from ropeway.reporting.ledger_steps import Step, list_steps, split_tokens
from ropeway.reporting.pictures import Lengths, draw_lengths
from ropeway.reporting.render import render
from ropeway.reporting.token_view import Reading, Shown, Vocabulary, next_token

_OPEN_SOURCES = 5  # with more, sections begin folded
_SHOWN_TOKENS = 900  # of a sample; `ropeway inspect` prints all
_MIN_TOKENS = 24  # of one piece of a packed row
_TAIL_SHARE = 4  # of a shortened sequence, one part in so many is its end


@dataclass(frozen=True)
class Page:
    """What the page is about.

    Attributes:
        profile: As prepare reads it.
        name: The profile's.
        shards: Of the closed data folder.
        ledger: As ledger.json holds it.
        raw: Source -> its entry in the raw manifest.
        vocabulary: Tokens in characters.
    """

    profile: Profile
    name: str
    shards: Shards
    ledger: Mapping[str, Any]
    raw: Mapping[str, Any]
    vocabulary: Vocabulary


@dataclass(frozen=True)
class Sample:
    """A few readings under a title: one sequence, or the pieces of a row."""

    title: str
    words: str
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class Excerpt:
    """The tokens of a reading that are shown, each with whether it is supervised.

    Attributes:
        reading: Shown.
        head: Its first tokens, or all.
        left_out: Tokens between head and tail.
        tail: Its last tokens, if any were left out.
        taught_next: The token after the piece that its last position is trained on, if it is.
    """

    reading: Reading
    head: Sequence[tuple[Shown, bool]]
    left_out: int
    tail: Sequence[tuple[Shown, bool]]
    taught_next: str | None


@dataclass(frozen=True)
class ShownSample:
    """A sample with its tokens in characters."""

    title: str
    words: str
    excerpts: tuple[Excerpt, ...]
    is_row: bool


@dataclass(frozen=True)
class Source:
    """A source of the page; `samples` are read while the page is rendered, since a sequence may be large."""

    account: Mapping[str, Any]
    refused: int
    first_refused: Sequence[Mapping[str, str]]
    sequences: int
    over: int
    parts: Mapping[str, int]
    steps: Sequence[Step]
    lengths: Lengths | None
    samples: Iterator[ShownSample]


def draw_page(page: Page, samples: Iterable[Iterable[Sample]], rows: Iterable[Sample]) -> str:
    """Return the whole file.

    Args:
        page: What it is about.
        samples: For each source in order; taken one source after another.
        rows: Packed rows, none in the padded layout.
    """
    chosen = iter(samples)
    sources = [
        _plan_source(page, account, source, (_show(page, sample) for sample in next(chosen, ())))
        for account, source in zip(page.ledger["sources"], page.shards.sources, strict=True)
    ]
    return render(
        "data.html.jinja",
        title=f"{page.name}: prepared data",
        profile=page.profile,
        epochs=page.ledger["epochs"],
        part_names=list(sources[0].parts),
        open_sources=_OPEN_SOURCES,
        rows=[_show(page, sample) for sample in rows],
        sources=sources,
    )


def _plan_source(
    page: Page, account: Mapping[str, Any], source: SourceShards, samples: Iterator[ShownSample]
) -> Source:
    return Source(
        account=account,
        refused=sum(sum(account["records"][f"refused_by_{stage}"].values()) for stage in ("fetch", "tokenize")),
        first_refused=page.raw[account["name"]].get("first_refused", []),
        sequences=len(source.lengths),
        over=int((source.lengths > page.profile.max_length).sum()),
        parts=split_tokens(account),
        steps=list_steps(account),
        lengths=draw_lengths(source.lengths, page.profile.max_length),
        samples=samples,
    )


def _show(page: Page, sample: Sample) -> ShownSample:
    limit = max(_SHOWN_TOKENS // max(len(sample.readings), 1), _MIN_TOKENS)
    excerpts = tuple(_cut(page, reading, limit) for reading in sample.readings)
    return ShownSample(sample.title, sample.words, excerpts, is_row=len(excerpts) > 1)


def _cut(page: Page, reading: Reading, limit: int) -> Excerpt:
    """Return a reading's tokens, of a long one its beginning and its end."""
    count = len(reading.tokens)
    tail = limit // _TAIL_SHARE if count > limit else 0
    head = limit - tail if tail else count

    def shown(part: slice) -> list[tuple[Shown, bool]]:
        tokens = page.vocabulary.show(reading.tokens[part].tolist())
        return list(zip(tokens, reading.learned[part].tolist(), strict=True))

    return Excerpt(
        reading=reading,
        head=shown(slice(0, head)),
        left_out=count - head - tail,
        tail=shown(slice(count - tail, count)),
        taught_next=next_token(reading, page.shards, page.profile, page.vocabulary),
    )
