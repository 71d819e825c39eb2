"""Prepared data small enough for a test, made by the real prepare stage from records that a test writes down."""

import json
import shutil
from typing import NamedTuple

import numpy as np

from ropeway.config.load_params import load_profile
from ropeway.config.stages import READS
from ropeway.data.raw_records import RawWriter
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.conversation import Conversation
from ropeway.reporting import report_data
from ropeway.runtime.manifest import write_manifest
from ropeway.runtime.workspace import Workspace
from tests.support.chat_templates import write_tokenizer
from tests.support.shipped_params import read_shipped_params
from tests.support.tiny_run import BLOCK, PARITY
from tests.support.tokenizing import tokenize_and_prepare

TALKS = [
    Conversation((f"Is lamp {n} lit?", "Yes. " * (1 + n % 9), "Really?", "No."), ("", "Be brief.")[n % 2])
    for n in range(20)
]
TEXTS = [f"Log of day {n}: " + "calm sea, no sail. " * (n % 7) for n in range(16)]


class Sequence(NamedTuple):
    """One conversation, document or chunk, out of the columns of `ropeway.stages.tokenize.encode.Encoded`."""

    tokens: np.ndarray
    kinds: np.ndarray
    record: int
    key: int
    record_key: int


def encode_each(encoder, records):
    """The sequences of these records, one by one."""
    found = []
    for part in encoder.encode_batches(records):
        cuts = np.cumsum(part.lengths)[:-1]
        columns = (np.split(part.tokens, cuts), np.split(part.kinds, cuts), part.records, part.keys, part.record_keys)
        found += [Sequence(*row) for row in zip(*columns, strict=True)] if len(part.lengths) else []
    return found


def make_prepared(  # noqa: PLR0913 - builders of tests have many defaults
    root, *, talks=TALKS, texts=TEXTS, refused=(), counted=None, fraction=0.5, style=None, **changes
):
    """Return (workspace, profile as prepare reads it); `changes` are scalars of the profile `tiny`.

    `counted` are more entries of `talk` in the raw manifest, `fraction` is that of `text`, `style` is a Jinja template
    with its tokenizer in place of the published one.
    """
    values = {"max_length": 32, **changes}
    block = BLOCK.replace("  max_length: 96\n", "".join(f"  {key}: {value}\n" for key, value in values.items()))
    block = block.replace(", fraction: 0.5", f", fraction: {fraction}")
    (root / "params.yaml").write_text(read_shipped_params("tiny") + "\n" + block)
    workspace, (_, profile) = Workspace(root, "tiny"), load_profile(root / "params.yaml")
    facts = {}
    for name, kind, records in (("talk", "conversation", talks), ("text", "document", texts)):
        with RawWriter(workspace.raw / name, kind) as writer:
            for record in records:
                writer.add(record)
        facts[name] = {"kind": kind, "read": len(records), "kept": len(records), "refused": {}, "first_refused": []}
    for one in refused:
        counts = facts["talk"]["refused"]
        counts[one["reason"]] = counts.get(one["reason"], 0) + 1
        facts["talk"] |= {"read": facts["talk"]["read"] + 1}
        facts["talk"]["first_refused"].append(one)
    facts["talk"] |= counted or {}
    write_manifest(workspace.raw, {"sources": facts})
    if style:
        workspace.base.mkdir(parents=True)
        write_tokenizer(workspace.base, style)
        path = workspace.base / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "pad_token": style.eos}))
    else:
        shutil.copytree(PARITY / "tokenizer", workspace.base)
        (workspace.base / "chat_template.jinja").write_text(OPEN_ASSISTANT.jinja)
    tokenize_and_prepare(workspace, profile)
    profile = profile.reading(READS["prepare"])
    report_data.run(workspace, profile)
    return workspace, profile


def reckon_supervised(ids, *, what_counts="published", document=False):
    """Say of each token of a whole sequence whether it is supervised, from the roles alone and one token at a time."""
    supervised, turn = [False], 0
    for at, number in enumerate(ids[:-1]):
        turn += number in (2000, 2001)
        following = turn + (ids[at + 1] in (2000, 2001))
        answering = turn > 0 and turn % 2 == 0
        if document:
            supervised.append(True)
        elif what_counts == "published":
            supervised.append(turn == 0 or answering)
        else:  # the text of an answer and its end, asked of an answer's token that answers on
            supervised.append(answering and following == turn)
    return supervised
