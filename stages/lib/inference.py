"""Features, logits and accuracy: always fp32, eager, evaluation mode, in chunks of one size, whatever trained the net."""

from collections.abc import Iterator

import numpy as np
import torch

from stages.lib.training import Architecture, normalise

CHUNK = 500  # images; fixed, since the last bits of a product may depend on its shape


@torch.inference_mode()
def outputs(
    model: torch.nn.Module, architecture: Architecture, images: np.ndarray, device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (features (B, D), logits (B, C)) float32 chunk by chunk for (N, H, W, C) uint8 images."""
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True  # the same bytes on a re-run
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
    model = model.to(device, memory_format=torch.channels_last).eval()
    mean, std = (torch.tensor(values, device=device) * 255 for values in (architecture.mean, architecture.std))
    for start in range(0, len(images), CHUNK):
        chunk = torch.from_numpy(images[start : start + CHUNK]).to(device)
        features = model.forward_features(normalise(chunk, mean, std))
        yield features.cpu().numpy(), model.forward_head(features).cpu().numpy()


def predict(model, architecture: Architecture, images: np.ndarray, device: torch.device) -> np.ndarray:
    """Predicted class of each image, (N,) int64."""
    return np.concatenate([logits.argmax(1) for _, logits in outputs(model, architecture, images, device)])
