// SPDX-License-Identifier: Apache-2.0
// Packed voxels: reading them, and finding the voxel that a ray of sight meets.
"use strict";

/**
 * Surface voxels as page.py's pack_voxels wrote them.
 * @param {string} packed base64 of zlib of all x, all y, all z, all labels.
 * @param {number[]} shape cells of the grid (x, y, z).
 * @returns {Promise<{count: number, x, y, z, label}>} typed arrays of indices and labels.
 */
async function unpackVoxels(packed, shape) {
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const numbers = Math.max(...shape) <= 256 ? new Uint8Array(buffer) : new Uint16Array(buffer);
  const count = numbers.length / 4;
  const [x, y, z, label] = [0, 1, 2, 3].map((k) => numbers.subarray(k * count, (k + 1) * count));
  return { count, x, y, z, label };
}

/** Dense grid of label + 1, 0 where there is nothing to be seen; index (x * Y + y) * Z + z. */
function denseVoxels(voxels, shape, isVisible) {
  const dense = new Uint8Array(shape[0] * shape[1] * shape[2]);
  for (let i = 0; i < voxels.count; i++) {
    if (isVisible[voxels.label[i]]) {
      dense[(voxels.x[i] * shape[1] + voxels.y[i]) * shape[2] + voxels.z[i]] = voxels.label[i] + 1;
    }
  }
  return dense;
}

/** How many of the eight cells around (x, y, z + 1) are filled: corners there lie in shade. */
function shadeCount(dense, shape, x, y, z) {
  if (z + 1 >= shape[2]) return 0;
  let count = 0;
  for (let i = Math.max(x - 1, 0); i <= Math.min(x + 1, shape[0] - 1); i++) {
    for (let j = Math.max(y - 1, 0); j <= Math.min(y + 1, shape[1] - 1); j++) {
      if (dense[(i * shape[1] + j) * shape[2] + z + 1]) count += 1;
    }
  }
  return count;
}

/**
 * First filled cell along a ray (Amanatides and Woo, Eurographics 1987).
 * @param {number[]} origin, direction in cells.
 * @returns {?{x, y, z, label}} or null.
 */
function firstVoxel(dense, shape, origin, direction) {
  let enter = 0;
  let leave = Infinity;
  for (let a = 0; a < 3; a++) {
    const [near, far] = [(0 - origin[a]) / direction[a], (shape[a] - origin[a]) / direction[a]];
    enter = Math.max(enter, Math.min(near, far));
    leave = Math.min(leave, Math.max(near, far));
  }
  if (!(enter < leave)) return null;
  const cell = [0, 1, 2].map((a) => Math.min(shape[a] - 1, Math.max(0, Math.floor(origin[a] + (enter + 1e-6) * direction[a]))));
  const step = direction.map((d) => (d > 0 ? 1 : -1));
  const next = direction.map((d, a) => (cell[a] + (d > 0 ? 1 : 0) - origin[a]) / d);
  for (;;) {
    const value = dense[(cell[0] * shape[1] + cell[1]) * shape[2] + cell[2]];
    if (value) return { x: cell[0], y: cell[1], z: cell[2], label: value - 1 };
    const axis = next[0] < next[1] ? (next[0] < next[2] ? 0 : 2) : next[1] < next[2] ? 1 : 2;
    cell[axis] += step[axis];
    if (cell[axis] < 0 || cell[axis] >= shape[axis]) return null;
    next[axis] += Math.abs(1 / direction[axis]);
  }
}
