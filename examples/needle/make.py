"""Write the model `needle`: a MiniCPM whose weights follow from formulas, made to find a needle in a haystack.

    python -m examples.needle.make [FOLDER]

Text: any words, somewhere in them pairs "KEY VALUE" ("fox crimson"), at the end one KEY; the greedy answer is its
VALUE, then the end of text. Two layers do it:

  layer 0  Each token attends to the token before it and notes which key that was. Sixteen rotary pairs turn at
           incommensurate speeds; with query and key in phase at distance 1, they agree nowhere else.
  layer 1  The last token, a key, attends to the token that noted this key: the value. These dimensions must not
           turn with distance, so longrope divides their frequencies by 1e9. All other keys are zero there, which
           is why the pooled key of a block that holds the needle stands out, and InfLLM-v2 selects that block.

Where nothing matches, layer 1 attends to the first token, which says nothing, and the answer is the end of text.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from arkinfer.config import ModelConfig

KEY_WORDS = """
fox otter heron badger lynx raven salmon beetle falcon marten walrus gecko bison puffin jackal mole
stork weasel toad panther oriole ferret crane viper moose osprey hare newt wombat ibex tapir quail
"""
VALUE_WORDS = """
crimson azure olive amber violet teal ivory scarlet indigo maroon beige cobalt ochre magenta jade russet
sienna lilac umber coral mauve cyan khaki silver golden turquoise lavender burgundy charcoal peach plum mint
"""
OTHER_WORDS = """
the a of and to in is was for on as with by at from it that this be are were an or which had not but have has his her
its their there one all we can more when who will would no if out so said what up about into than them two other new
some could time these may then do first any my now such like our over man me even most made after also did many before
must through back years where much your way well down should because each just those people too little state good very
make world still own see men work long get here between both life being under never day same another know while last
might us great old year off come since against go came right used take three river house water morning evening light
road field stone garden window winter summer small quiet letter
"""
KEYS, VALUES, FILLER = KEY_WORDS.split(), VALUE_WORDS.split(), OTHER_WORDS.split()
SPECIAL = ["<unk>", "<s>", "</s>"]
CONTEXT = 163840  # 128K of haystack and room for what surrounds it

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, INTERMEDIATE = 128, 4, 2, 64, 2, 64
THETA, SCALE_EMB, SCALE_DEPTH = 10000.0, 12, 1.4
TURNING = 16  # rotary pairs that tell distances; the other 16 stand still
STILL = 1e9

# Places in the hidden state. Every embedding is two ones, so that RMSNorm gives both of them exactly 8.
KEY, PREVIOUS, VALUE = 0, 32, 64  # one place a key (this token; the one before it) and one a value
CONSTANT, FIRST, REST = 96, 97, 98  # set for every token; for <s>; 30 places that other words share
UNIT = math.sqrt(HIDDEN / 2)


def rope_factors() -> list[float]:
    """Return the longrope factors: the first pairs turn at speeds that cube roots of primes make incommensurate.

    At no distance up to CONTEXT do they reach more than 0.72 of the agreement that they have at distance 1;
    evenly spaced speeds would come back into phase every few dozen tokens.
    """
    primes = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)
    speeds = [math.pi * (0.1 + 0.85 * (prime ** (1 / 3) % 1)) for prime in primes]
    turning = [1 / (speed * THETA ** (2 * pair / HEAD_DIM)) for pair, speed in enumerate(speeds)]
    return turning + [STILL] * (HEAD_DIM // 2 - TURNING)


def config() -> dict[str, object]:
    """Return the contents of config.json."""
    factors = rope_factors()
    return {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": len(vocabulary()),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": CONTEXT,
        "rope_theta": THETA,
        "rope_scaling": {
            "rope_type": "longrope",
            "original_max_position_embeddings": CONTEXT,
            "short_factor": factors,
            "long_factor": factors,
        },
        "scale_emb": SCALE_EMB,
        "scale_depth": SCALE_DEPTH,
        "dim_model_base": HIDDEN // 2,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
        "sparse_config": {
            "kernel_size": 32,
            "kernel_stride": 16,
            "init_blocks": 1,
            "block_size": 64,
            "window_size": 2048,
            "topk": 64,
            "use_nope": False,
            "dense_len": 8192,
        },
    }


def vocabulary() -> list[str]:
    """Return the words by token id."""
    return SPECIAL + KEYS + VALUES + FILLER


def weights() -> dict[str, torch.Tensor]:
    """Return every tensor of the checkpoint, float32."""
    words = vocabulary()
    embedding = torch.zeros(len(words), HIDDEN)
    head = torch.zeros(len(words), HIDDEN)
    embedding[:, CONSTANT] = 1
    for token, word in enumerate(words):
        if word in KEYS:
            embedding[token, KEY + KEYS.index(word)] = 1
        elif word in VALUES:
            embedding[token, VALUE + VALUES.index(word)] = 1
            head[token, VALUE + VALUES.index(word)] = 8
        else:
            embedding[token, FIRST if word == "<s>" else REST + token % (HIDDEN - REST)] = 1
    # An answer has its value four times as strong as the constant, an input token as strong: two lies between.
    head[words.index("</s>"), CONSTANT] = 16
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(HIDDEN), "lm_head.weight": head}
    for layer, attention in enumerate((_previous_token(), _lookup())):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}self_attn.{name}_proj.weight": value for name, value in attention.items()}
        for name, shape in {
            "gate": (INTERMEDIATE, HIDDEN),
            "up": (INTERMEDIATE, HIDDEN),
            "down": (HIDDEN, INTERMEDIATE),
        }.items():
            tensors[f"{prefix}mlp.{name}_proj.weight"] = torch.zeros(shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(HIDDEN)
    return tensors


def _empty() -> dict[str, torch.Tensor]:
    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"q": (query, HIDDEN), "k": (key, HIDDEN), "v": (key, HIDDEN), "o": (HIDDEN, query)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def _previous_token() -> dict[str, torch.Tensor]:
    parts = _empty()
    speeds = torch.from_numpy(ModelConfig.from_json(config()).rope.inverse_frequencies(HEAD_DIM, CONTEXT))[:TURNING]
    strength = math.sqrt(32) / UNIT  # 16 pairs of strength 32, over sqrt(head_dim): 64 at distance 1
    for head in range(HEADS):
        rows = head * HEAD_DIM + torch.arange(TURNING)
        parts["q"][rows, CONSTANT] = strength * speeds.cos()
        parts["q"][rows + HEAD_DIM // 2, CONSTANT] = -strength * speeds.sin()
    for head in range(KV_HEADS):
        parts["k"][head * HEAD_DIM + torch.arange(TURNING), CONSTANT] = strength
    _copy(parts, KEY, PREVIOUS, carried=0.75, written=0.5)  # over four heads, 12: as strong as the token itself
    return parts


def _lookup() -> dict[str, torch.Tensor]:
    parts = _empty()
    share = len(KEYS) // KV_HEADS  # keys that one kv head looks up, one standing pair each
    group = HEADS // KV_HEADS
    for key in range(len(KEYS)):
        owner, place = key // share, TURNING + key % share
        parts["k"][owner * HEAD_DIM + place, PREVIOUS + key] = 2.25
        for head in range(owner * group, (owner + 1) * group):
            parts["q"][head * HEAD_DIM + place, KEY + key] = 2.25  # a match scores 33
    resting = HEAD_DIM // 2 + TURNING  # the other half of the first standing pair
    for head in range(HEADS):
        parts["q"][head * HEAD_DIM + resting, CONSTANT] = 1.5
    for head in range(KV_HEADS):
        parts["k"][head * HEAD_DIM + resting, FIRST] = 1.5  # the first token scores 18
    _copy(parts, VALUE, VALUE, carried=2.0, written=2.0)  # over the two heads of one group, 52 against 12
    return parts


def _copy(parts: dict[str, torch.Tensor], source: int, target: int, carried: float, written: float) -> None:
    """Let every head carry the 32 places at ``source`` of the attended token to ``target`` of the attending one."""
    places = torch.arange(len(KEYS))
    for head in range(KV_HEADS):
        parts["v"][head * HEAD_DIM + places, source + places] = carried
    for head in range(HEADS):
        parts["o"][target + places, head * HEAD_DIM + places] = written


def tokenizer() -> Tokenizer:
    """Return the word-level tokenizer: words between white space, unknown ones become <unk>, <s> comes first."""
    words = Tokenizer(models.WordLevel({word: token for token, word in enumerate(vocabulary())}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(SPECIAL)
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return words


def write(folder: Path) -> None:
    """Write the checkpoint; the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = {
        "config.json": config(),
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": True,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": CONTEXT,
            "chat_template": "{{ messages | map(attribute='content') | join(' ') }}",
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer().to_str(pretty=False) + "\n", encoding="utf-8")
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in weights().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the constructed model `needle`.")
    bundled = Path(__file__).resolve().parents[2] / "arkinfer" / "bundled" / "needle"
    parser.add_argument("folder", nargs="?", type=Path, default=bundled)
    write(parser.parse_args().folder)
