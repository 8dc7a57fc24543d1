# SPDX-License-Identifier: Apache-2.0
"""docs/images/mesh.png: a keyframe of the demo drive as the demo model's voxels, and as the mesh of its field.

python docs/images/mesh_picture.py
"""

from pathlib import Path

import numpy as np
from PIL import Image

from occflownet_core.mesh import extract_mesh
from occflownet_core.picture import View, draw_mesh, draw_voxels, stacked, titled
from occflownet_core.runtime.bundle import load_bundle
from occflownet_core.runtime.drive import predictions
from occflownet_core.runtime.factory import create_engine
from occflownet_core.runtime.field_query import FieldQuery
from occflownet_ros.engine_inputs import bag_inputs
from occflownet_ros.share import share_path

FRAME, LEVELS = 3, 2
VIEW = View((-17.0, 5.0, 11.0), (9.0, -1.0, -1.0), (0, 0, 1), 62.0, 900, 440)
COLORS = 128

bundle = load_bundle(share_path("demo", "bundle"))
engine = create_engine(bundle, "onnxruntime", threads=1)
engine.keep_field = True
*_, (_, prediction) = predictions(engine, bag_inputs(share_path("demo", "bag"), bundle, most=FRAME + 1))
field = FieldQuery(bundle).field(prediction.field_features)
mesh = extract_mesh(field, bundle.lift.grid, bundle.occupancy_threshold, LEVELS, closed=True)
size_m = mesh.cells.grid.voxel_size_m
pictures = [
    titled(draw_voxels(prediction.labels, bundle.grid, VIEW), f"Voxels of {bundle.grid.voxel_size_m:g} m"),
    titled(
        draw_mesh(mesh.vertices_m, mesh.triangles, mesh.colors_rgb, VIEW),
        f"The same field as a mesh at {size_m:g} m",
        f"{len(mesh.triangles):,} triangles",
    ),
]
picture = Image.fromarray(np.ascontiguousarray(stacked(pictures)))
picture.quantize(COLORS, Image.Quantize.MEDIANCUT).save(Path(__file__).with_name("mesh.png"), optimize=True)
