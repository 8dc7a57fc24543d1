# SPDX-License-Identifier: Apache-2.0
"""docs/images/drive.jpg: the mesh of a whole drive, as training.fit_scene writes it.

python -m training.data.minicity --out data/a --scenes 2 --keyframes 10 --seed 501 --image-size 480x270
python -m training.fit_scene --dataroot data/a --scenes minicity-501-0000 --out out/fitted --mesh-file drive.ply
python docs/images/drive_picture.py out/fitted/minicity-501-0000/drive.ply
"""

import sys
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image

from occflownet_core.picture import View, draw_mesh, titled

VIEW = View((-30.0, 18.0, 26.0), (19.5, 0.0, 0.0), (0, 0, 1), 50.0, 1200, 620)  # the drive begins at (0, 0, 0)

shape = trimesh.load(sys.argv[1], process=False)
colors_rgb = np.asarray(shape.visual.vertex_colors)[:, :3]
picture = titled(
    draw_mesh(np.asarray(shape.vertices), np.asarray(shape.faces), colors_rgb, VIEW, ego=False),
    "Ten keyframes of LiDAR as one mesh",
    f"{len(shape.faces):,} triangles",
)
Image.fromarray(np.ascontiguousarray(picture)).save(Path(__file__).with_name("drive.jpg"), quality=85, optimize=True)
