"""A GGUF file of a two-layer Llama in an importable package with a version, as PyPI packages carry models."""

import gguf
import numpy as np

PACKAGE, FILE, VERSION = "tiny_gguf_model", "tiny.F32.gguf", "1.2"
WIDTH, INNER, LAYERS, HEADS, POSITIONS = 32, 64, 2, 4, 64
_LETTERS = "▁etaoinshrdlucmfwypvbgkqjxzTIAWHSMB.,?'()=_"
_PAIRS = ["▁t", "he", "in", "▁a", "er", "on", "▁the", "▁in"]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *_LETTERS, *_PAIRS]
SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": len(TOKENS),
    "max_position_embeddings": POSITIONS,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def write_package(folder):
    """Write `folder/tiny_gguf_model` and its metadata; put `folder` on sys.path to install it."""
    package = folder / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    metadata = folder / f"{PACKAGE}-{VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n")
    write_model(package / FILE)


def write_model(path, *, scaling=None, factors=None):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    pieces = [-float(len(TOKENS))] * (3 + 256 + len(_LETTERS)) + [-float(rank) for rank in range(1, 1 + len(_PAIRS))]
    writer.add_token_scores(pieces)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 259)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    draw = np.random.default_rng(0)

    def add(name, *shape):
        writer.add_tensor(f"{name}.weight", (draw.standard_normal(shape) * 0.1).astype(np.float32))

    add("token_embd", len(TOKENS), WIDTH)
    if factors:
        writer.add_tensor("rope_freqs.weight", np.full(WIDTH // HEADS // 2, factors, np.float32))
    add("output", len(TOKENS), WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}", WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_gate", INNER, WIDTH)
        add(f"blk.{layer}.ffn_up", INNER, WIDTH)
        add(f"blk.{layer}.ffn_down", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
