"""Estimate of a rank's peak memory: weights, gradients, optimizer, buckets, activations, logits.

Shapes: P positions of a rank's micro-batch (rows x tokens), H hidden, F intermediate, K key and value width, A heads,
L layers, V vocabulary, N weights, R ranks, s bytes per number in the training dtype (2 in fp16 and bf16, 4 in fp32).

Activations are those that stage base counted on the base's own layers; until it has run, those of transformers' Llama.
Attention is a fused kernel. They are compared with the measured peak (tests/contract/test_memory.py). `phases` adds
what DeepSpeed allocates and gives the peak of each phase.
"""

from dataclasses import dataclass, replace

from ropeway.config.params import Profile
from ropeway.config.sections import PUBLISHED_TEMPLATE
from ropeway.config.zero import PARTITIONED_STAGE, Zero
from ropeway.models.architectures import HEAD_LAYER, LayerBytes, check_heads
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.planning.shape import MeasuredWeights
from ropeway.runtime.errors import ConfigError

DTYPE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
FP32 = 4
MOMENTS = 8  # Adam's two moments in fp32
CHUNK_POSITIONS = 1024  # equal to the value in models/supervised_loss.py; a test compares them
GIB = 2**30
# Assumed, not measured here: CUDA context and libraries 0.5 GiB, NCCL buffers 0.5 GiB, and fragmentation of the caching
# allocator, 5 % of temporary memory.
CONTEXT_BYTES = GIB
FRAGMENTATION = 0.05
PROCESS_BYTES = 2 * GIB  # assumed, per rank: Python, torch and CUDA libraries in host memory


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a dense decoder.

    Attributes:
        vocabulary: Rows of the padded embedding.
        head_dim: Size of a head; 0: `hidden` / `heads`.
        measured: Weights and activations of the base itself; None: those of a Llama with these sizes.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool
    head_dim: int = 0
    measured: MeasuredWeights | None = None

    @classmethod
    def of(cls, profile: Profile, measured: MeasuredWeights | None = None) -> "Sizes":
        """Return the sizes of `expected_model` with added tokens and padded vocabulary.

        Raises:
            ConfigError: `expected_model` is null; see `with_shape`.
        """
        shape, multiple = profile.expected_model, profile.pad_vocab_to_multiple_of
        if shape is None:
            raise ConfigError("expected_model is null; state the shape of the base")
        added = len(OPEN_ASSISTANT.added_tokens) if profile.template == PUBLISHED_TEMPLATE else 0
        rows = -(-(shape.vocab_size + added) // multiple) * multiple
        return cls(
            head_dim=shape.head_dim or 0,
            measured=measured,
            hidden=shape.hidden_size,
            intermediate=shape.intermediate_size,
            layers=shape.num_hidden_layers,
            heads=shape.num_attention_heads,
            key_value_heads=shape.num_key_value_heads,
            vocabulary=measured.rows if measured else max(shape.vocab_size, rows),
            tied=shape.tie_word_embeddings,
        )

    @property
    def key_value(self) -> int:
        """Width of keys and of values."""
        return self.query * self.key_value_heads // self.heads

    @property
    def query(self) -> int:
        """Width of queries and of the attention's output."""
        return self.head_dim * self.heads or self.hidden

    @property
    def layer_weights(self) -> tuple[int, ...]:
        """Elements of each weight of a layer of a Llama, in the order of transformers.

        q, k, v, o, gate, up, down, and the norms before attention and MLP.

        Source: Touvron et al. 2023, arXiv:2302.13971; grouped heads: Ainslie et al. 2023, arXiv:2305.13245.
        """
        hidden = self.hidden
        attention = (hidden * self.query, hidden * self.key_value, hidden * self.key_value, hidden * self.query)
        return (*attention, *(hidden * self.intermediate,) * 3, hidden, hidden)

    @property
    def all_layer_weights(self) -> tuple[int, ...]:
        """Elements of each weight of all layers, in the model's order."""
        return self.measured.layers if self.measured else self.layer_weights * self.layers

    @property
    def embedding_parameters(self) -> int:
        """Weights of one embedding matrix."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights."""
        if self.measured:
            return self.measured.parameters
        tables = self.embedding_parameters * (1 if self.tied else 2)
        return tables + sum(self.all_layer_weights) + self.hidden


@dataclass(frozen=True, slots=True)
class Load:
    """The work of one rank; replace a field with `dataclasses.replace` to plan a remedy.

    Attributes:
        number_bytes: s in the docstring of this module.
        adapters: Number of LoRA weights.
        trainable: Number of weights that are trained: all, or with LoRA the adapters (and embeddings).
        global_batch_size: Rows per optimizer step over all ranks.
        micro_batch_size: Rows per forward pass; packed rows are concatenated.
        row_tokens: Maximum length of a row, in tokens.
        sequence_parallel: Ranks that share each row.
        checkpointing: Layers store only their input and are recomputed in backward.
        trains_down: Whether down_proj is trained or has an adapter; else its input is not kept for backward.
        masked: Attention uses a (P x P) mask: packed rows on a GPU without a flash kernel. On a CPU there is no mask
            (`attend_each` in models/attention.py), so the estimate is too high there.
    """

    sizes: Sizes
    number_bytes: int
    adapters: int
    trainable: int
    ranks: int
    global_batch_size: int
    micro_batch_size: int
    row_tokens: int
    sequence_parallel: int
    checkpointing: bool
    trains_down: bool
    masked: bool
    zero: Zero

    @classmethod
    def of(cls, profile: Profile, zero: Zero, *, ranks: int, measured: MeasuredWeights | None = None) -> "Load":
        """Return the work of one rank in a run of this profile; raise ConfigError if ranks cannot share its rows."""
        sizes = Sizes.of(profile, measured)
        check_heads(sizes.heads, sizes.key_value_heads, profile.sequence_parallel)
        adapters, tables = count_adapters(profile, sizes)
        return cls(
            sizes=sizes,
            adapters=adapters,
            trainable=adapters + tables if profile.peft_model else sizes.parameters,
            number_bytes=DTYPE_BYTES[profile.dtype],
            ranks=ranks,
            global_batch_size=profile.global_batch_size,
            micro_batch_size=profile.per_device_train_batch_size,
            row_tokens=profile.max_length,
            sequence_parallel=profile.sequence_parallel,
            checkpointing=profile.gradient_checkpointing,
            trains_down=not profile.peft_model
            or (profile.lora is not None and "down_proj" in profile.lora.target_modules),
            masked=profile.layout == "packed" and not profile.use_flash_attention and profile.sequence_parallel == 1,
            zero=zero,
        )

    @property
    def parameters(self) -> int:
        """N: all weights, adapters included."""
        return self.sizes.parameters + self.adapters

    @property
    def positions(self) -> int:
        """P: positions of a micro-batch on this rank."""
        return -(-self.micro_batch_size * self.row_tokens // self.sequence_parallel)

    @property
    def counted_layer(self) -> LayerBytes | None:
        """Activations of the base's own layers; None: not counted."""
        measured = self.sizes.measured
        return measured.activations.get(self.number_bytes) if measured else None

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of a rank per optimizer step."""
        return max(1, self.global_batch_size * self.sequence_parallel // (self.micro_batch_size * self.ranks))


def trained_weights(load: Load) -> list[int]:
    """Return the elements of each trained weight in the model's order; a layer's LoRA adapters count as one."""
    sizes = load.sizes
    tables = [sizes.embedding_parameters] * (1 if sizes.tied else 2)
    if load.adapters:
        layers = [load.adapters // sizes.layers] * sizes.layers
        return layers if load.trainable == load.adapters else [tables[0], *layers, *tables[1:]]
    others = sizes.parameters - sum(tables) - sum(sizes.all_layer_weights)  # the final norm, and biases of the head
    return [tables[0], *sizes.all_layer_weights, others, *tables[1:]]


def count_adapters(profile: Profile, sizes: Sizes) -> tuple[int, int]:
    """Return (weights of the LoRA matrices, embedding weights trained with them); (0, 0) without LoRA.

    A target of `in` to `out` features has rank x (in + out) weights. Source: Hu et al. 2021, arXiv:2106.09685.
    """
    lora = profile.lora
    if not profile.peft_model or lora is None:
        return 0, 0
    hidden, key_value, intermediate = sizes.hidden, sizes.key_value, sizes.intermediate
    sides = {
        "q_proj": hidden + sizes.query,
        "k_proj": hidden + key_value,
        "v_proj": hidden + key_value,
        "o_proj": hidden + sizes.query,
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj", "c_fc", "c_proj"), hidden + intermediate),
        "qkv_proj": hidden + sizes.query + 2 * key_value,  # fused in some families
        "gate_up_proj": hidden + 2 * intermediate,
    }
    # Training rejects targets that the model does not have. Names of other families count as its widest layer, so that
    # the plan is not too low; the head exists once.
    inner = [name for name in lora.target_modules if name != HEAD_LAYER]
    adapters = sizes.layers * lora.rank * sum(sides.get(name, hidden + intermediate) for name in inner)
    adapters += lora.rank * (hidden + sizes.vocabulary) * lora.target_modules.count(HEAD_LAYER)
    tables = sizes.embedding_parameters * (1 if sizes.tied else 2)
    return adapters, tables if lora.train_embeddings else 0


def layer_activation_bytes(load: Load) -> int:
    """Return the bytes that one layer stores for its backward pass.

    Masks, adapters and shared rows change a counted layer by what they change a Llama's.
    """
    counted = load.counted_layer
    if counted is None:
        return _llama_layer_bytes(load)
    plain = replace(
        load, masked=False, adapters=0, trains_down=True, sequence_parallel=1, micro_batch_size=1,
        row_tokens=load.positions,
    )  # fmt: skip
    return counted.kept * load.positions + _llama_layer_bytes(load) - _llama_layer_bytes(plain)


def _llama_layer_bytes(load: Load) -> int:
    """Return the bytes that a layer of a Llama stores.

    Two norms (fp32 input, normalized input, scaled output), q, k, v and the attention output with a log-sum-exp per
    head, and four tensors of the MLP's width. With a mask, every layer stores it in the training dtype. Frozen layers
    do not keep the normalized input of a norm and, without an adapter on down_proj, its input.
    """
    sizes, width, positions = load.sizes, load.number_bytes, load.positions
    norm = positions * (sizes.hidden * (FP32 + 2 * width) + FP32)
    key_value = sizes.query if load.masked else _key_value_width(load)  # with a mask, key-value heads are repeated
    outputs = 1 if load.sequence_parallel == 1 else 2  # before and after it is sent back to the tokens' ranks
    attention = positions * (width * ((1 + outputs) * sizes.query + 2 * key_value) + FP32 * sizes.heads)
    mask = width * positions**2 if load.masked else 0
    frozen = positions * width * sizes.hidden if load.adapters else 0
    mlp = (4 if load.trains_down else 3) * positions * width * sizes.intermediate
    return 2 * norm + attention + mask + mlp - frozen


def _key_value_width(load: Load) -> int:
    """Return the width of keys and of values in attention; ranks that share rows repeat heads if there are too few."""
    return load.sizes.key_value * max(1, load.sequence_parallel // load.sizes.key_value_heads)


def plan_activations(load: Load) -> dict[str, int]:
    """Return the bytes of activations and logits at the peak of forward and backward.

    The peak is the largest of three: a chunk of the loss, backward of the final norm, backward of the last layer.
    `logits` is the excess of the first over the other two, at least 0.
    """
    sizes, width, positions = load.sizes, load.number_bytes, load.positions
    layer = layer_activation_bytes(load)
    state = width * positions * sizes.hidden
    kept = sizes.layers * (state if load.checkpointing else layer)
    mask = positions**2 if load.masked else 0  # one boolean mask, shared by all layers
    # Final norm: fp32 input, normalized input, gradient and temporaries of backward: 24 bytes in each dtype.
    norm = 24 * positions * sizes.hidden
    # After the last MLP: gradients of the state and of two tensors of the MLP's width.
    counted, llama = load.counted_layer, width * (sizes.hidden + 2 * sizes.intermediate)
    backward = (layer if load.checkpointing else 0) + positions * (counted.backward if counted else llama)
    chunk = min(CHUNK_POSITIONS, positions)
    # Log-probabilities and two of their gradients in fp32; from the second chunk on also gradients of head and state.
    loss = positions * sizes.hidden * (FP32 + 2 * width) + 3 * FP32 * chunk * sizes.vocabulary
    loss += width * sizes.embedding_parameters + state if positions > chunk else 0
    layers = max(norm, backward)
    return {"activations": kept + mask + layers, "logits": max(0, loss - layers)}


def plan_forward(load: Load) -> int:
    """Return the bytes of activations at the peak of forward.

    What the layers keep, and the larger of two: in the last layer, if it is recomputed later, two states and three
    tensors of the MLP's width, or if ranks share rows the exchange (queries, keys and values before, sent and received,
    and four states); after it the final norm (fp32 input, two states), the input and the supervised states, and a
    chunk's logits in the training dtype and twice in fp32.
    """
    sizes, width, positions = load.sizes, load.number_bytes, load.positions
    state = width * positions * sizes.hidden
    layer = layer_activation_bytes(load)
    logits = min(CHUNK_POSITIONS, positions) * sizes.vocabulary * (width + 2 * FP32)
    last = 4 * state + FP32 * positions * sizes.hidden + logits
    if load.checkpointing:
        counted, llama = load.counted_layer, width * (2 * sizes.hidden + 3 * sizes.intermediate)
        mlp = positions * (counted.forward if counted else llama)
        exchange = 4 * state + 3 * width * positions * (sizes.query + 2 * _key_value_width(load))
        within = max(mlp, exchange) if load.sequence_parallel > 1 else mlp
        return sizes.layers * state + max(last, within)
    return sizes.layers * layer + last


def checkpoint_bytes(load: Load) -> int:
    """Return the size of one checkpoint in bytes."""
    return stored_bytes(load.parameters, load.trainable, number_bytes=load.number_bytes, stage=load.zero.stage)


def stored_bytes(weights: int, trainable: int, *, number_bytes: int, stage: int) -> int:
    """Return the bytes of a checkpoint: fp32 copies and two moments of trainable weights, and all weights.

    At ZeRO stage 3 the weights in the training dtype are not stored. Measured on deepspeed 0.19.8: 14 bytes/weight in
    bf16, 16 in fp32, 12 at stage 3.

    >>> stored_bytes(1000, 1000, number_bytes=2, stage=2), stored_bytes(1000, 10, number_bytes=4, stage=2)
    (14000, 4120)
    """
    own = 0 if stage == PARTITIONED_STAGE else number_bytes
    return trainable * (FP32 + MOMENTS) + weights * own
