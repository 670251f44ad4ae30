"""A tiny random CLIP, saved as any CLIP is."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ["a", "cat", "dog", "on", "the", "mat", "two", "hands", "."]


def make_clip(folder: Path) -> Path:
    """Save a random CLIP of 30,000 parameters, its tokenizer and its image processor; returns the folder."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vocab = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *(f"{w}</w>" for w in WORDS)])}
    for word in WORDS:
        for letter in word:
            vocab.setdefault(letter, len(vocab))
            vocab.setdefault(f"{letter}</w>", len(vocab))
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            vocab.setdefault(parts[0], len(vocab))
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=8).save_pretrained(folder)
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**part, "vocab_size": len(vocab), "max_position_embeddings": 8, "eos_token_id": 1, "bos_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**part, "image_size": 30, "patch_size": 6}, projection_dim=12)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}).save_pretrained(folder)
    return folder
