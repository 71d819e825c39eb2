"""Estimate of a rank's peak memory: weights, gradients, optimizer, buckets, activations, logits.

Shapes: P positions of a micro-batch (rows x tokens), H hidden, F intermediate, K key and value width, A heads,
L layers, V vocabulary, N weights, R ranks, s bytes per number in the training dtype (2 in fp16 and bf16, 4 in fp32).

Model states follow DeepSpeed's estimator. Activations are summed over the tensors of transformers' Llama with a fused
attention kernel, and compared with the measured peak (tests/contract/test_memory.py). With LoRA they are estimated as
in full training: too high for frozen layers, too low for adapters, not measured.
"""

from dataclasses import dataclass

from ropeway.config.params import Profile
from ropeway.config.zero import PARTITIONED_STAGE, Zero
from ropeway.models.architectures import HEAD_LAYER
from ropeway.models.chat_template import choose_template

DTYPE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
FP32 = 4
MOMENTS = 8  # Adam's two moments in fp32
CHUNK_POSITIONS = 1024  # equal to the value in train/loss.py; a test compares them
GIB = 2**30
# Assumed, not measured here: CUDA context and libraries 0.5 GiB, NCCL buffers 0.5 GiB, and fragmentation of the caching
# allocator, 5 % of temporary memory.
CONTEXT_BYTES = GIB
FRAGMENTATION = 0.05
PROCESS_BYTES = 2 * GIB  # assumed, per rank: Python, torch and CUDA libraries in host memory


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a Llama model; `vocabulary` is the number of rows of the padded embedding."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, profile: Profile) -> "Sizes":
        """Return the sizes of `expected_model` with added tokens and padded vocabulary."""
        shape, multiple = profile.expected_model, profile.pad_vocab_to_multiple_of
        return cls(
            hidden=shape.hidden_size,
            intermediate=shape.intermediate_size,
            layers=shape.num_hidden_layers,
            heads=shape.num_attention_heads,
            key_value_heads=shape.num_key_value_heads,
            vocabulary=-(-(shape.vocab_size + len(choose_template().added_tokens)) // multiple) * multiple,
            tied=shape.tie_word_embeddings,
        )

    @property
    def key_value(self) -> int:
        """Width of keys and of values."""
        return self.hidden * self.key_value_heads // self.heads

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer: four attention projections, three of the MLP, two norms.

        Source: Touvron et al. 2023, arXiv:2302.13971; grouped heads: Ainslie et al. 2023, arXiv:2305.13245.
        """
        hidden = self.hidden
        return 2 * hidden * hidden + 2 * hidden * self.key_value + 3 * hidden * self.intermediate + 2 * hidden

    @property
    def embedding_parameters(self) -> int:
        """Weights of one embedding matrix."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights."""
        tables = self.embedding_parameters * (1 if self.tied else 2)
        return tables + self.layers * self.layer_parameters + self.hidden


@dataclass(frozen=True, slots=True)
class Load:
    """The work of one rank; replace a field with `dataclasses.replace` to plan a remedy.

    Attributes:
        number_bytes: s in the docstring of this module.
        adapters: Number of LoRA weights.
        trainable: Number of weights that are trained: all, or with LoRA the adapters (and embeddings).
        micro_batch_size: Rows per forward pass; packed rows are concatenated.
        row_tokens: Maximum length of a row, in tokens.
        checkpointing: Layers store only their input and are recomputed in backward.
        masked: Attention uses a (P x P) mask: packed rows on a GPU without a flash kernel. On a CPU there is no mask
            (`attend_each` in models/attention.py), so the estimate is too high there.
    """

    sizes: Sizes
    number_bytes: int
    adapters: int
    trainable: int
    ranks: int
    micro_batch_size: int
    row_tokens: int
    checkpointing: bool
    masked: bool
    zero: Zero

    @classmethod
    def of(cls, profile: Profile, zero: Zero, *, ranks: int) -> "Load":
        """Return the work of one rank in a run of this profile."""
        sizes = Sizes.of(profile)
        adapters, tables = count_adapters(profile, sizes)
        return cls(
            sizes=sizes,
            adapters=adapters,
            trainable=adapters + tables if profile.peft_model else sizes.parameters,
            number_bytes=DTYPE_BYTES[profile.dtype],
            ranks=ranks,
            micro_batch_size=profile.per_device_train_batch_size,
            row_tokens=profile.max_length,
            checkpointing=profile.gradient_checkpointing,
            masked=profile.layout == "packed" and not profile.use_flash_attention,
            zero=zero,
        )

    @property
    def parameters(self) -> int:
        """N: all weights, adapters included."""
        return self.sizes.parameters + self.adapters

    @property
    def positions(self) -> int:
        """P: positions of a micro-batch."""
        return self.micro_batch_size * self.row_tokens


def count_adapters(profile: Profile, sizes: Sizes) -> tuple[int, int]:
    """Return (weights of the LoRA matrices, embedding weights trained with them); (0, 0) without LoRA.

    A target of `in` to `out` features has rank x (in + out) weights. Source: Hu et al. 2021, arXiv:2106.09685.
    """
    lora = profile.lora
    if not profile.peft_model or lora is None:
        return 0, 0
    hidden, key_value, intermediate = sizes.hidden, sizes.key_value, sizes.intermediate
    sides = {
        "q_proj": 2 * hidden,
        "k_proj": hidden + key_value,
        "v_proj": hidden + key_value,
        "o_proj": 2 * hidden,
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + intermediate),
    }
    # Training rejects unknown targets; the head is the only other linear layer.
    adapters = sizes.layers * lora.rank * sum(sides.get(name, 0) for name in lora.target_modules)
    adapters += lora.rank * (hidden + sizes.vocabulary) * lora.target_modules.count(HEAD_LAYER)
    tables = sizes.embedding_parameters * (1 if sizes.tied else 2)
    return adapters, tables if lora.train_embeddings else 0


def plan_states(load: Load) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer states on one GPU.

    Gradients count twice, in the training dtype and in fp32 for the step, as in DeepSpeed. Source: deepspeed 0.19.8,
    estimate_zero2_model_states_mem_needs: 2 N + 18 N / R in 16 bit, 2 N with offload. For stage 3 its estimator counts
    18 N / R and 4 bytes per weight of the largest layer. The code holds gradients of 2 N / R, fp32 gradients of one
    sub-group, and gathered weights up to the limits of the JSON (`live_weights`); this function counts those.
    """
    zero, weights, width = load.zero, load.parameters, load.number_bytes
    live = min(weights, max(zero.live_elements, load.sizes.embedding_parameters) + zero.prefetch_elements)
    gradients = width * load.trainable // _ranks_from(2, load) + step_gradient_bytes(load)
    if zero.offload_optimizer:  # stage 1 keeps all until the step; higher stages move each bucket to the host
        gradients = width * load.trainable if zero.stage <= 1 else 0
    return {
        "weights": 0 if zero.offload_parameters else width * weights // _ranks_from(3, load),
        "live_weights": width * live if _ranks_from(3, load) > 1 or zero.offload_parameters else 0,
        "gradients": gradients,
        "optimizer": 0 if zero.offload_optimizer else (FP32 + MOMENTS) * load.trainable // _ranks_from(1, load),
    }


def step_gradient_bytes(load: Load) -> int:
    """Return the bytes of the temporary fp32 gradients of an optimizer step."""
    share = load.trainable // _ranks_from(1, load)
    if load.zero.offload_optimizer:
        return 0
    return FP32 * (min(share, load.zero.sub_group_elements) if load.zero.stage == PARTITIONED_STAGE else share)


def _ranks_from(stage: int, load: Load) -> int:
    """Return the number of ranks over which states are partitioned that ZeRO partitions from `stage` on."""
    return load.ranks if load.zero.stage >= stage else 1


def layer_activation_bytes(load: Load) -> int:
    """Return the bytes that one layer stores for its backward pass.

    Two norms (fp32 input, normalized input, scaled output), q, k, v and the attention output with a log-sum-exp per
    head, and four tensors of the MLP's width. With a mask, every layer stores it in the training dtype.
    """
    sizes, width, positions = load.sizes, load.number_bytes, load.positions
    norm = positions * (sizes.hidden * (FP32 + 2 * width) + FP32)
    key_value = sizes.hidden if load.masked else sizes.key_value  # with a mask, key-value heads are repeated
    attention = positions * (width * (2 * sizes.hidden + 2 * key_value) + FP32 * sizes.heads)
    mask = width * positions**2 if load.masked else 0
    return 2 * norm + attention + mask + 4 * positions * width * sizes.intermediate


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
    backward = (layer if load.checkpointing else 0) + width * positions * (sizes.hidden + 2 * sizes.intermediate)
    chunk = min(CHUNK_POSITIONS, positions)
    # Log-probabilities and two of their gradients in fp32; from the second chunk on also gradients of head and state.
    loss = positions * sizes.hidden * (FP32 + 2 * width) + 3 * FP32 * chunk * sizes.vocabulary
    loss += width * sizes.embedding_parameters + state if positions > chunk else 0
    layers = max(norm, backward)
    return {"activations": kept + mask + layers, "logits": max(0, loss - layers)}


def plan_gpu(load: Load) -> dict[str, int]:
    """Return the bytes of one GPU by part, and their `total`. On a CPU the same parts are in host memory."""
    zero = load.zero
    buckets = zero.bucket_elements * load.number_bytes * (2 if zero.overlap else 1) if zero.stage else 0
    # The all-gather after a step writes into the weights, without a bucket (deepspeed 0.19.8 on NCCL).
    parts = {**plan_states(load), "buckets": buckets, **plan_activations(load)}
    temporary = sum(parts[name] for name in ("gradients", "buckets", "activations", "logits", "live_weights"))
    parts["reserve"] = CONTEXT_BYTES + int(FRAGMENTATION * temporary)
    return {**parts, "total": sum(parts.values())}


def certain_bytes(load: Load) -> int:
    """Return the minimum bytes on a GPU for any rows: states without fp32 gradients, and buckets; no assumptions."""
    parts = plan_gpu(load)
    states = parts["weights"] + parts["optimizer"] + parts["gradients"] + parts["buckets"]
    return states - step_gradient_bytes(load)


def plan_host(load: Load) -> dict[str, int]:
    """Return the host memory in bytes of all ranks on one machine by part, and their `total`.

    Every rank loads the whole model before it is partitioned. Offloaded states are allocated later, so the larger of
    the two counts. Offload: fp32 weights, moments and gradients, 16 N. Source: as in `plan_states`, without its factor
    of 1.5.
    """
    weights, zero = load.parameters, load.zero
    opening = load.ranks * load.number_bytes * weights
    kept = (FP32 + MOMENTS + FP32) * load.trainable if zero.offload_optimizer else 0
    kept += load.number_bytes * weights if zero.offload_parameters else 0
    parts = {"opening": opening, "offloaded": kept, "processes": load.ranks * PROCESS_BYTES}
    return {**parts, "total": max(opening, kept) + parts["processes"]}


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
