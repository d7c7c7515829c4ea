"""Zero-shot classification: class embeddings from prompt ensembles, and the nearest class of each image.

Metrics of the result are in metrics.py; prompts in prompts.py.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from graft_pipeline.errors import InputError
from training.zero_shot.prompts import PromptSet

#: Texts in, (N, D) float32 L2-normalised embeddings out.
EncodeTexts = Callable[[Sequence[str]], NDArray[np.float32]]


def class_embeddings(prompts: PromptSet, encode_texts: EncodeTexts) -> NDArray[np.float32]:
    """One embedding per class: the normalised mean of its prompts' (Radford et al., 2021, section 3.1.4).

    Args:
        prompts: classes, words and templates.
        encode_texts: f_T, such as `functools.partial(encoders.encode_texts, clip)`.

    Returns:
        (K, D) float32, L2-normalised, in the order of `prompts.names`.
    """
    per_class = list(prompts.prompts().values())
    embeddings = encode_texts([prompt for some in per_class for prompt in some])
    bounds = np.cumsum([len(some) for some in per_class])[:-1]
    means = np.stack([part.mean(axis=0) for part in np.split(embeddings, bounds)])
    return (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)


def class_scores(images: NDArray[np.float32], classes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine of every image with every class.

    Args:
        images: (N, D) float32, L2-normalised.
        classes: (K, D) float32, L2-normalised.

    Returns:
        (N, K) float32.

    Raises:
        InputError: if the widths differ.
    """
    if images.shape[-1] != classes.shape[-1]:
        raise InputError(
            f"Images {images.shape} and classes {classes.shape} are not in one space: use one model."
        )
    return images @ classes.T


def classify(images: NDArray[np.float32], classes: NDArray[np.float32]) -> NDArray[np.int64]:
    """The nearest class of each image.

    Args:
        images: (N, D) float32, L2-normalised.
        classes: (K, D) float32, L2-normalised.

    Returns:
        (N,) int64 class numbers.

    Raises:
        InputError: if the widths differ.
    """
    return class_scores(images, classes).argmax(axis=1)
