"""The sections of params.yaml on where things come from: each data set's records, and the base model."""

from typing import Annotated, Literal

from pydantic import Field

from ropeway.config.section import Positive, Section


class RowsSource(Section):
    """Files of rows: of which form they are, and which of their columns are read.

    `ignored_keys` are fields, of records or of their turns, that may carry something and are left out all the same,
    `*` any; a record with another one is refused. `splits` are those that one pattern may read together.
    """

    rows: Literal["orca_chat", "messages", "sharegpt", "alpaca", "text"]
    columns: dict[str, str]
    expected_rows: Positive | None
    ignored_keys: list[str] = Field(default_factory=list)
    splits: list[Literal["train", "validation", "test"]] = Field(default_factory=list)


class HuggingfaceSource(RowsSource):
    """Files of one data set repository at one revision."""

    kind: Literal["huggingface"]
    repo: str
    revision: str
    files: list[str]


class FilesSource(RowsSource):
    """json, jsonl or parquet files, also compressed."""

    kind: Literal["files"]
    paths: list[str]


class PythonDocsSource(Section):
    """The documentation that comes with the running Python: `topics` are documents, `docstrings` conversations."""

    kind: Literal["python_docs"]
    part: Literal["topics", "docstrings"]
    expected_rows: Positive | None


Source = Annotated[HuggingfaceSource | FilesSource | PythonDocsSource, Field(discriminator="kind")]


class FolderBase(Section):
    """`model_name` is a folder that transformers opens."""

    kind: Literal["folder"]


class HubBase(Section):
    """`model_name` is a repository on the Hub, at this revision."""

    kind: Literal["hub"]
    revision: str


class ScratchBase(Section):
    """Weights from the seed, in the shape of `expected_model`; the tokenizer is trained on the sources."""

    kind: Literal["scratch"]


class GgufBase(Section):
    """A GGUF file that an installed Python package carries, opened de-quantised."""

    kind: Literal["gguf"]
    package: str
    file: str


Base = Annotated[FolderBase | HubBase | ScratchBase | GgufBase, Field(discriminator="kind")]
