"""A sequence as HTML, token by token: learned ones filled, special ones framed, nothing invisible."""

from collections.abc import Iterator
from html import escape

from ropeway.config.params import Profile
from ropeway.data.shards import Shards
from ropeway.reporting.token_view import Reading, Shown, Sort, Vocabulary, next_token, split_visible

_TAIL_SHARE = 4  # of a shortened sequence, one part in so many is its end


def draw_legend(profile: Profile) -> str:
    """Return what the colours mean, for these params."""
    counts = {
        "published": "everything but the prompter's turns, so the beginning of text and the system message too",
        "answers": "the assistant's answers and their end token",
    }[profile.what_counts]
    rule = f"what_counts: {profile.what_counts}" if profile.label_masking else "label_masking: false, everything counts"
    says = f"{rule}{f' ({counts})' if profile.label_masking else ''}; document_end: {profile.document_end}"
    marks = [
        ("<b>learned</b>", "this token is supervised: the model is taught to predict it from what stands before it"),
        ("<i>read</i>", "it is read as context, and predicting it does not count"),
        ('<i class="x">&lt;s&gt;</i>', "a special token (filled when it is learned)"),
        ('<b><u>·</u></b> <b><u>⏎</u></b> <i class="c">U+200B</i>', "blank, new line, characters that show nothing"),
        ('<b class="y">F0</b><b class="y">9F</b>', "single bytes; the last of a character names it"),
    ]
    if profile.document_end != "masked":
        marks.append(('<b class="g">&lt;/s&gt;</b>', "learned behind a document's last token, though it is not stored"))
    items = "".join(f'<li><span class="tokens key">{mark}</span> {words}</li>' for mark, words in marks)
    exact = (
        "A token is filled when loss_mask is True at the position <em>before</em> it, which is where it is predicted. "
        "A first token is never learned: nothing stands before it."
    )
    return (
        f'<section class="card"><h2>How to read the samples</h2><ul class="legend">{items}</ul>'
        f"<p>{exact} Here {says}.</p></section>"
    )


def draw_reading(
    reading: Reading, shards: Shards, profile: Profile, vocabulary: Vocabulary, *, limit: int, named: bool
) -> str:
    """Return a reading's tokens, of a long one its beginning and its end.

    Args:
        reading: Drawn.
        shards: It comes from.
        profile: Whose mask it was read with.
        vocabulary: Tokens in characters.
        limit: Most tokens drawn.
        named: Say which sequence it is, as among others in a row.
    """
    count, behind = len(reading.tokens), next_token(reading, shards, profile, vocabulary)
    parts = [_border(reading)] if named else []
    if reading.piece.begin:
        parts.append(_gap(reading.piece.begin, "before it are not read here"))
    tail = limit // _TAIL_SHARE
    spans = [(0, count)] if count <= limit else [(0, limit - tail), (count - tail, count)]
    for at, (begin, end) in enumerate(spans):
        if at:
            parts.append(_gap(begin - spans[0][1], "left out on this page; ropeway inspect prints all"))
        learned = reading.learned[begin:end].tolist()
        shown = vocabulary.show(reading.tokens[begin:end].tolist())
        parts += _draw_tokens(zip(shown, learned, strict=True))
    if behind is not None:
        parts.append(f'<b class="g">{escape(behind)}</b>')
    if left := reading.length - reading.piece.end:
        parts.append(_gap(left, "behind it are not read here"))
    return f"<p>{''.join(parts)}</p>"


def _draw_tokens(tokens: Iterator[tuple[Shown, bool]]) -> Iterator[str]:
    for shown, is_learned in tokens:
        tag = "b" if is_learned else "i"
        kind = ' class="x"' if shown.is_special else ' class="y"' if shown.is_bytes else ""
        text = "".join(_draw_part(sort, part) for sort, part in split_visible(shown.text))
        completes = "".join(_draw_part(sort, part) for sort, part in split_visible(shown.completes))
        yield f"<{tag}{kind}>{text}{f'<em>{completes}</em>' if completes else ''}</{tag}>"


def _draw_part(sort: Sort, text: str) -> str:
    if sort is Sort.PLAIN:
        return escape(text)
    if sort is Sort.CODE:
        return f'<u class="c">{text}</u>'
    return f"<u>{text}</u>\n" if sort is Sort.BREAK else f"<u>{text}</u>"


def _border(reading: Reading) -> str:
    piece = reading.piece
    where = f"{escape(reading.source)} #{piece.sequence:,}, tokens {piece.begin:,} to {piece.end - 1:,}"
    return f'<span class="piece">{where}</span>\n'


def _gap(count: int, words: str) -> str:
    return f'\n<span class="gap">&hellip; {count:,} tokens {words} &hellip;</span>\n'
