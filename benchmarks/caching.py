"""What caching the ground embeddings saves: one training step with them, and one that encodes the photos anew.

`python benchmarks/caching.py --architecture ViT-B-32`; random weights and pixels, as only time is measured.
"""

import argparse
import time

import numpy as np
import open_clip
import torch

from training.encoders import image_features
from training.foundation import FoundationConfig
from training.losses import image_level_loss
from training.optimisation import make_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", default="planet", help="planet, or any of open_clip's")
    parser.add_argument("--tiles", type=int, default=64, help="tiles per step")
    parser.add_argument("--photos", type=float, default=4.0, help="photos per tile")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    is_planet = options.architecture == "planet"
    config = (
        FoundationConfig().model_config() if is_planet else open_clip.get_model_config(options.architecture)
    )
    satellite, ground = (open_clip.CLIP(**config).visual.to(options.device) for _ in range(2))
    optimizer = make_optimizer(satellite.parameters(), 1e-5, 0.05, (0.9, 0.98))
    side = config["vision_cfg"]["image_size"]
    count = round(options.tiles * options.photos)
    chips = torch.randn(options.tiles, 3, side, side, device=options.device)
    photos = torch.randn(count, 3, side, side, device=options.device)
    tile_of_photo = (torch.arange(count) % options.tiles).to(options.device)
    cache = torch.nn.functional.normalize(torch.randn(count, config["embed_dim"]), dim=1).to(options.device)

    def step(*, is_cached: bool) -> float:
        started = time.perf_counter()
        if is_cached:
            embedded = cache
        else:
            with torch.no_grad():
                embedded = image_features(ground, photos)
        loss = image_level_loss(image_features(satellite, chips), embedded, tile_of_photo, 0.07)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        # Reading the loss waits for the device.
        loss.item()
        return time.perf_counter() - started

    step(is_cached=False)
    # Interleaved, so that whatever else the machine does hits both; the least of each is reported.
    seconds = np.array([[step(is_cached=True), step(is_cached=False)] for _ in range(options.repeats)]).min(
        axis=0
    )
    print(f"{options.architecture}, {options.tiles} tiles, {count} photos, {options.threads} threads")
    print(f"cached {seconds[0] * 1e3:8.0f} ms   {options.tiles / seconds[0]:8.1f} tiles/s")
    print(f"online {seconds[1] * 1e3:8.0f} ms   {options.tiles / seconds[1]:8.1f} tiles/s")
    print(f"ratio  {seconds[1] / seconds[0]:8.2f}")


if __name__ == "__main__":
    main()
