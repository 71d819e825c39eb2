"""The loss mask: which tokens of a sequence are supervised; used by prepare, training and evaluation.

It depends on the speaker of each token (`Kind`, set by tokenize) and on `label_masking`, `what_counts` and
`document_end` of params.yaml.
"""

import numpy as np
from numpy.typing import NDArray

from ropeway.config.params import RowParams
from ropeway.data.shards import Kind


def loss_mask(kinds: NDArray[np.uint8], profile: RowParams) -> NDArray[np.bool_]:
    """Return `(T,)`, True where predicting token t + 1 from token t counts, for a complete or truncated sequence."""
    return loss_masks(kinds, np.array([len(kinds)]), profile)


def loss_masks(kinds: NDArray[np.uint8], lengths: NDArray[np.integer], profile: RowParams) -> NDArray[np.bool_]:
    """Return the `(T,)` loss masks of concatenated sequences of `lengths` tokens each.

    A position counts by the kind of its own token, though it predicts the next one, as in the original:

    - `label_masking: false`: every position.
    - `what_counts: published`: all but the prompter's turns, so BOS and the system message count too.
    - `what_counts: answers`: positions that predict an answer's text or its end token. Under a Jinja template this is
      exactly what the model would generate.

    The last position of a sequence has no next token. For the end of a document, `document_end` decides whether it
    counts; any other last position does not count.
    """
    documents = (kinds == Kind.DOCUMENT) | (kinds == Kind.DOCUMENT_END)
    if not profile.label_masking:
        mask = np.ones(len(kinds), dtype=np.bool_)
    elif profile.what_counts == "published":
        mask = kinds != Kind.PROMPTER
    else:
        following = np.append(kinds[1:], np.uint8(Kind.PROMPTER))
        answers = (kinds == Kind.ASSISTANT) & (following == Kind.ASSISTANT)
        mask = documents | answers | (following == Kind.ANSWER)
    last = np.cumsum(lengths)[np.asarray(lengths) > 0] - 1
    ends = {"masked": False, "eos": kinds[last] == Kind.DOCUMENT_END, "published": True}
    mask[last] = documents[last] & ends[profile.document_end]
    return mask
