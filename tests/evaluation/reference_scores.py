"""Reference scores by transformers, one text at a time."""

import numpy as np
import torch


def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """Log-likelihood of `continuation` after the tokenizer's first token and `context`."""
    ids = tokenizer(context + continuation).input_ids
    start = len(tokenizer(context).input_ids)
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    return sum(float(log_probs[place - 1, ids[place]]) for place in range(start, len(ids)))


def label_logits(model, tokenizer, prompt: str, labels: list[str]) -> np.ndarray:
    """Logits of the single token of each label at the last position of the prompt."""
    ids = tokenizer(prompt).input_ids
    with torch.no_grad():
        last = model(torch.tensor([ids])).logits[0, -1]
    followed = [tokenizer(f"{prompt} {label}").input_ids for label in labels]
    assert all(each[:-1] == ids for each in followed)
    return np.array([float(last[each[-1]]) for each in followed])


def label_scores(model, tokenizer, prompt: str, labels: list[str]) -> np.ndarray:
    """Log-likelihood of each whole label."""
    return np.array([log_likelihood(model, tokenizer, prompt, f" {label}") for label in labels])


def choice_scores(model, tokenizer, choices: list[tuple[str, str]]) -> np.ndarray:
    return np.array([log_likelihood(model, tokenizer, *choice) for choice in choices])


def per_character(scores: np.ndarray, choices: list[tuple[str, str]]) -> np.ndarray:
    return scores / [len(continuation.strip()) for _, continuation in choices]
