"""TRM's formulas in plain numpy, float64, one row at a time: nothing of the project is used.

x question, y output, z latent, [S, D] of one row; weights by their names. Written from the paper's
pseudocode and the description of the authors' public code.
"""

import math

import numpy as np

Array = np.ndarray


def rms_norm(h: Array) -> Array:
    return h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True) + 1e-5)


def swiglu(h: Array, gate_up: Array, down: Array) -> Array:
    gate, up = np.split(h @ gate_up.T, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ down.T


def rope(h: Array) -> Array:
    """[S, d]: each pair (i, i + d/2) is turned by the angle position / 10000^(2i / d)."""
    positions, width = h.shape
    half = width // 2
    turned = np.empty_like(h)
    for s in range(positions):
        for i in range(half):
            angle = s / 10_000 ** (2 * i / width)
            # Tables of the public code are float32, and ours.
            cos, sin = float(np.float32(math.cos(angle))), float(np.float32(math.sin(angle)))
            turned[s, i] = h[s, i] * cos - h[s, i + half] * sin
            turned[s, i + half] = h[s, i + half] * cos + h[s, i] * sin
    return turned


def attention(h: Array, qkv: Array, out: Array, heads: int) -> Array:
    width = h.shape[1]
    query, key, value = np.split(h @ qkv.T, 3, axis=-1)
    mixed = np.empty_like(h)
    for head in range(heads):
        own = slice(head * width // heads, (head + 1) * width // heads)
        scores = rope(query[:, own]) @ rope(key[:, own]).T / math.sqrt(width // heads)
        strengths = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed[:, own] = strengths / strengths.sum(axis=-1, keepdims=True) @ value[:, own]
    return mixed @ out.T


def block(h: Array, weights: dict[str, Array], heads: int) -> Array:
    """Post-norm, and no bias anywhere; the mixer's first norm runs over the positions."""
    if "over_positions.gate_up.weight" in weights:
        h = h.T
        h = rms_norm(
            h
            + swiglu(
                h, weights["over_positions.gate_up.weight"], weights["over_positions.down.weight"]
            )
        ).T
    else:
        h = rms_norm(
            h
            + attention(h, weights["attention.qkv.weight"], weights["attention.out.weight"], heads)
        )
    return rms_norm(
        h + swiglu(h, weights["over_width.gate_up.weight"], weights["over_width.down.weight"])
    )


def network(h: Array, weights: dict[str, Array], heads: int) -> Array:
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    for number in range(depth):
        start = f"blocks.{number}."
        own = {
            name.removeprefix(start): weights[name] for name in weights if name.startswith(start)
        }
        h = block(h, own, heads)
    return h


def question(tokens: Array, vector: Array, weights: dict[str, Array], prefix: int) -> Array:
    """sqrt(D) [prefix; embedding of the tokens]; the prefix is the puzzle's vector, then zeros."""
    width = weights["embedding"].shape[1]
    front = np.zeros(prefix * width)
    front[: len(vector)] = vector
    return math.sqrt(width) * np.concatenate(
        [front.reshape(prefix, width), weights["embedding"][tokens]]
    )


def latent_recursion(
    x: Array,
    y: Array,
    z: Array,
    weights: dict[str, Array],
    n: int,
    heads: int,
) -> tuple[Array, Array]:
    for _ in range(n):
        z = network(z + y + x, weights, heads)
    return network(y + z, weights, heads), z


def heads_of(y: Array, weights: dict[str, Array], prefix: int) -> tuple[Array, float]:
    """Logits of the tokens, [L, V], and the halting logit, which position 0 gives."""
    halt = weights["halt_head.weight"][0] @ y[0] + weights["halt_head.bias"][0]
    return y[prefix:] @ weights["token_head.weight"].T, float(halt)


def stablemax_cross_entropy(logits: Array, labels: Array) -> float:
    """The mean over cells that count of -log(s(v) / sum of s)."""
    losses = []
    for v, label in zip(logits, labels, strict=True):
        if label != -100:
            s = np.array([each + 1 if each >= 0 else 1 / (1 - each) for each in v])
            losses.append(-math.log(s[label] / s.sum()))
    return sum(losses) / len(losses)


def halting_loss(logits: Array, halt: float, labels: Array) -> float:
    """Binary cross-entropy: was every cell that counts right?"""
    counts = labels != -100
    is_solved = bool((logits.argmax(-1) == labels)[counts].all())
    probability = 1 / (1 + math.exp(-halt))
    return -math.log(probability if is_solved else 1 - probability)


def objective(logits: Array, halt: float, labels: Array, global_batch: int) -> float:
    row = stablemax_cross_entropy(logits, labels) + 0.5 * halting_loss(logits, halt, labels)
    return row / global_batch


def sign_sgd(vector: Array, gradients: list[Array], lr: float, weight_decay: float) -> Array:
    """Of one puzzle, whose rows in the batch gave these gradients."""
    return vector * (1 - lr * weight_decay) - lr * np.sign(np.sum(gradients, axis=0))


def adam_atan2(weight: float, gradients: list[float], lr: float, weight_decay: float) -> float:
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        weight *= 1 - lr * weight_decay
        weight -= lr / (1 - 0.9**t) * math.atan2(m, math.sqrt(v) / math.sqrt(1 - 0.95**t))
    return weight


def truncated_normal_cdf(x: float, std: float) -> float:
    """Of a normal cut at two deviations, scaled so that what is left has the deviation `std`."""
    inside = math.erf(math.sqrt(2))
    kept = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / inside)
    return 0.5 + 0.5 * math.erf(x * kept / std / math.sqrt(2)) / inside
