"""Makes rotary.json with transformers and torch: `python tests/goldens/rotary.py`, where these are installed.

Of each configuration: the dictionary that it carries, and the frequencies and the factor that the original's own module
has for it, for a text of the length given.
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING

SMALL = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
CONFIGS = {
    "llama": dict(rope_theta=500000.0),
    "llama linear": dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
    "llama llama3": dict(
        max_position_embeddings=131072,
        rope_parameters=LLAMA3 | dict(rope_theta=500000.0, original_max_position_embeddings=8192),
    ),
    "llama dynamic": dict(
        max_position_embeddings=2048, rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0)
    ),
    "qwen3 yarn": dict(
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters=dict(
            rope_type="yarn", factor=4.0, rope_theta=1000000.0, original_max_position_embeddings=32768
        ),
    ),
    "gpt_oss": dict(head_dim=64),
    "deepseek_v3": dict(
        qk_rope_head_dim=64,
        max_position_embeddings=163840,
        rope_parameters=dict(
            rope_type="yarn",
            factor=40.0,
            rope_theta=10000.0,
            mscale=1.0,
            mscale_all_dim=1.0,
            original_max_position_embeddings=4096,
            beta_fast=32,
            beta_slow=1,
        ),
    ),
    "phi3 longrope": dict(
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=10000.0,
            short_factor=[1.0 + i / 100 for i in range(32)],
            long_factor=[1.0 + i / 3 for i in range(32)],
        ),
    ),
    "gpt_neox": dict(),
    "gemma3_text": dict(head_dim=64, num_hidden_layers=6),
    "stablelm": dict(),
}
FIELDS = (
    *("model_type", "hidden_size", "num_attention_heads", "head_dim", "qk_rope_head_dim", "rope_parameters"),
    *("rope_interleave", "max_position_embeddings", "original_max_position_embeddings"),
)
LENGTHS = {"phi3 longrope": (2048, 8192), "llama dynamic": (1024, 6000)}


def module_of(config):
    """The rotary module of a small model."""
    model = MODEL_MAPPING[type(config)](config)
    return next(part for name, part in model.named_modules() if name.endswith("rotary_emb"))


def frequencies(config, length, layer):
    module = module_of(config)
    positions = torch.arange(length)[None, -3:]
    module(torch.zeros(1, 3, 8), positions, *((layer,) if layer else ()))  # which makes it choose
    prefix = f"{layer}_" if layer else ""
    w = getattr(module, f"{prefix}inv_freq").double().tolist()
    return dict(w=w, factor=float(getattr(module, f"{prefix}attention_scaling")))


def main():
    found = []
    for name, changes in CONFIGS.items():
        kind = name.split()[0]
        config = AutoConfig.for_model(kind, **SMALL | changes)
        carried = {field: getattr(config, field) for field in FIELDS if getattr(config, field, None) is not None}
        layers = ("full_attention", "sliding_attention") if kind == "gemma3_text" else (None,)
        for length in LENGTHS.get(name, (64,)):
            for layer in layers:
                told = frequencies(config, length, layer)
                found.append(dict(name=name, config=carried, layer=layer, length=length, **told))
    made = dict(transformers=transformers.__version__, torch=torch.__version__, cases=found)
    Path(__file__).with_suffix(".json").write_text(json.dumps(made, indent=None, default=str) + "\n")


if __name__ == "__main__":
    main()
