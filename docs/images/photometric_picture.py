# SPDX-License-Identifier: Apache-2.0
"""Make docs/images/photometric.jpg: a MiniCity scene in a field fitted to its photographs alone.

python -m training.data.minicity --out data/a --scenes 12 --keyframes 10 --seed 501 --image-size 480x270
python -m training.fit_scene --from images --dataroot data/a --scenes minicity-501-0000 --out out/photographs
python docs/images/photometric_picture.py out/photographs/minicity-501-0000
"""

import sys
from pathlib import Path

import cv2

WIDTH_PX, QUALITY = 1400, 82

pictures = sorted(Path(sys.argv[1]).glob("*_field.png"))
if not pictures:
    sys.exit(f"{sys.argv[1]} has no *_field.png; fit the scene first")
picture = cv2.imread(str(pictures[-1]))
size = (WIDTH_PX, round(WIDTH_PX * picture.shape[0] / picture.shape[1]))
cv2.imwrite(
    str(Path(__file__).with_name("photometric.jpg")),
    cv2.resize(picture, size, interpolation=cv2.INTER_AREA),
    [cv2.IMWRITE_JPEG_QUALITY, QUALITY],
)
