// SPDX-License-Identifier: Apache-2.0
// The 3D viewer: instanced cubes of surface voxels in one pane, or in two panes that share a camera (three.js).
"use strict";

// Brightness of a cube's faces in three.js' order: +x, -x, +y, -y, +z, -z. The lowest is never seen.
const FACE_LIGHT = [0.8, 0.74, 0.66, 0.7, 1.0, 0.5];
const SHADE_PER_NEIGHBOUR = 0.045;
const EGO_SIZE_M = [4.08, 1.73, 1.5]; // nuScenes' Renault Zoe
const EGO_REAR_OVERHANG_M = 0.64;
const RANGE_RINGS_M = [10, 20, 30, 40];
const FIELD_OF_VIEW_DEG = 50;

class VoxelViewer {
  /**
   * @param {HTMLCanvasElement} canvas where to draw.
   * @param {{lower_m, upper_m, voxel_size_m, shape}} grid of all voxels.
   */
  constructor(canvas, grid) {
    this.canvas = canvas;
    this.grid = grid;
    this.renderer = new THREE.WebGLRenderer({ canvas, antialias: true, preserveDrawingBuffer: true });
    this.renderer.setPixelRatio(Math.min(window.devicePixelRatio, 2));
    this.renderer.setScissorTest(true);
    this.camera = new THREE.PerspectiveCamera(FIELD_OF_VIEW_DEG, 1, 0.5, 600);
    this.camera.up.set(0, 0, 1);
    this.controls = new THREE.OrbitControls(this.camera, canvas);
    this.controls.maxPolarAngle = 0.495 * Math.PI;
    this.controls.minDistance = 3;
    this.controls.maxDistance = 220;
    this.controls.addEventListener("change", () => this.requestDraw());
    this.geometry = cubeGeometry(grid.voxel_size_m);
    this.material = new THREE.MeshBasicMaterial({ vertexColors: true, map: edgeTexture(this.renderer) });
    this.panes = [this._makePane(), this._makePane()];
    this.paneCount = 1;
    this.drawn = 0;
    this._isDrawRequested = false;
    new ResizeObserver(() => this._resize()).observe(canvas.parentElement);
    this._resize();
    this.viewFromBehind();
  }

  /** Colours of background and lines, as CSS colours. */
  setTheme(background, lines) {
    for (const pane of this.panes) {
      pane.scene.background = new THREE.Color(background);
      pane.scene.fog = new THREE.Fog(background, 70, 330);
      pane.lines.material.color = new THREE.Color(lines);
    }
    this.requestDraw();
  }

  /** Show one pane or two beside each other. */
  setPaneCount(count) {
    this.paneCount = count;
    this._resize();
  }

  /**
   * Fill a pane.
   * @param {number} index of the pane.
   * @param {?object} voxels from unpackVoxels, or null for none.
   * @param {number[][]} palette RGB, 0..255, by label.
   * @param {boolean[]} isVisible by label.
   */
  setVoxels(index, voxels, palette, isVisible) {
    const pane = this.panes[index];
    if (pane.mesh) {
      pane.scene.remove(pane.mesh);
      pane.mesh.dispose();
      pane.mesh = null;
    }
    pane.dense = voxels ? denseVoxels(voxels, this.grid.shape, isVisible) : null;
    if (voxels) {
      pane.mesh = this._mesh(voxels, pane.dense, palette, isVisible);
      pane.scene.add(pane.mesh);
    }
    this.requestDraw();
  }

  /** How many cubes a pane shows. */
  cubeCount(index) {
    return this.panes[index].mesh ? this.panes[index].mesh.count : 0;
  }

  viewFromBehind() {
    const reach = this.grid.upper_m[0];
    this._look([-0.72 * reach, 0, 0.5 * reach], [0.16 * reach, 0, 0]);
  }

  viewFromAbove() {
    const centre = [0, 1, 2].map((a) => (this.grid.lower_m[a] + this.grid.upper_m[a]) / 2);
    const half = Math.max(this.grid.upper_m[0] - centre[0], (this.grid.upper_m[1] - centre[1]) / this.camera.aspect);
    const height = this.grid.upper_m[2] + (1.04 * half) / Math.tan((FIELD_OF_VIEW_DEG / 2) * (Math.PI / 180));
    // A hair behind the zenith, so that ahead is up.
    this._look([centre[0] - 0.001 * height, centre[1], height], centre);
  }

  viewFromClose() {
    this._look([-8.5, 0, 4.6], [12, 0, 0.2]);
  }

  /**
   * The voxel under a point of the canvas.
   * @returns {?{pane, x, y, z, label, centre_m}} or null.
   */
  voxelAt(offsetX, offsetY) {
    const width = this.canvas.clientWidth / this.paneCount;
    const index = Math.min(this.paneCount - 1, Math.floor(offsetX / width));
    const dense = this.panes[index].dense;
    if (!dense) return null;
    const point = new THREE.Vector3(((offsetX - index * width) / width) * 2 - 1, 1 - (offsetY / this.canvas.clientHeight) * 2, 0.5);
    const direction = point.unproject(this.camera).sub(this.camera.position).normalize();
    const size = this.grid.voxel_size_m;
    const origin = this.camera.position.toArray().map((v, a) => (v - this.grid.lower_m[a]) / size);
    const hit = firstVoxel(dense, this.grid.shape, origin, direction.toArray().map((d) => d || 1e-12));
    if (!hit) return null;
    const centre = [hit.x, hit.y, hit.z].map((i, a) => this.grid.lower_m[a] + (i + 0.5) * size);
    return { ...hit, pane: index, centre_m: centre };
  }

  requestDraw() {
    if (this._isDrawRequested) return;
    this._isDrawRequested = true;
    requestAnimationFrame(() => {
      this._isDrawRequested = false;
      this._draw();
    });
  }

  _draw() {
    const width = this.canvas.clientWidth / this.paneCount;
    const height = this.canvas.clientHeight;
    for (let i = 0; i < this.paneCount; i++) {
      this.renderer.setViewport(i * width, 0, width, height);
      this.renderer.setScissor(i * width + (i ? 1 : 0), 0, width - (i ? 1 : 0), height);
      this.renderer.render(this.panes[i].scene, this.camera);
    }
    this.drawn += 1;
  }

  _resize() {
    const { clientWidth, clientHeight } = this.canvas.parentElement;
    if (!clientWidth || !clientHeight) return;
    this.renderer.setSize(clientWidth, clientHeight, false);
    this.camera.aspect = clientWidth / this.paneCount / clientHeight;
    this.camera.updateProjectionMatrix();
    this.requestDraw();
  }

  _look(eye, target) {
    this.camera.position.set(...eye);
    this.controls.target.set(...target);
    this.controls.update();
    this.requestDraw();
  }

  _makePane() {
    const scene = new THREE.Scene();
    const lines = groundLines(this.grid);
    scene.add(lines, ...egoVehicle());
    return { scene, lines, mesh: null, dense: null };
  }

  _mesh(voxels, dense, palette, isVisible) {
    const shown = [];
    for (let i = 0; i < voxels.count; i++) if (isVisible[voxels.label[i]]) shown.push(i);
    const mesh = new THREE.InstancedMesh(this.geometry, this.material, Math.max(shown.length, 1));
    mesh.count = shown.length;
    mesh.frustumCulled = false;
    const colors = new Float32Array(3 * Math.max(shown.length, 1));
    const linear = palette.map((rgb) => new THREE.Color().setRGB(rgb[0] / 255, rgb[1] / 255, rgb[2] / 255, THREE.SRGBColorSpace));
    const matrix = mesh.instanceMatrix.array;
    const { lower_m: lower, voxel_size_m: size, shape } = this.grid;
    shown.forEach((i, n) => {
      const [x, y, z] = [voxels.x[i], voxels.y[i], voxels.z[i]];
      matrix.set([1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0], 16 * n);
      matrix.set([lower[0] + (x + 0.5) * size, lower[1] + (y + 0.5) * size, lower[2] + (z + 0.5) * size, 1], 16 * n + 12);
      const light = 1 - SHADE_PER_NEIGHBOUR * shadeCount(dense, shape, x, y, z);
      const color = linear[voxels.label[i]];
      colors.set([color.r * light, color.g * light, color.b * light], 3 * n);
    });
    mesh.instanceColor = new THREE.InstancedBufferAttribute(colors, 3);
    return mesh;
  }
}

/** A cube whose faces are lit differently; without its lowest face, which is never seen. */
function cubeGeometry(size) {
  const geometry = new THREE.BoxGeometry(size, size, size);
  const light = FACE_LIGHT.flatMap((value) => Array(4 * 3).fill(value));
  geometry.setAttribute("color", new THREE.BufferAttribute(new Float32Array(light), 3));
  geometry.setIndex(Array.from(geometry.index.array).slice(0, 5 * 6));
  geometry.clearGroups();
  return geometry;
}

/** A white square with a darker rim: cubes near by show their edges, far ones do not. */
function edgeTexture(renderer) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 64;
  const context = canvas.getContext("2d");
  context.fillStyle = "#c4c4c4";
  context.fillRect(0, 0, 64, 64);
  context.fillStyle = "#ffffff";
  context.fillRect(2.5, 2.5, 59, 59);
  const texture = new THREE.CanvasTexture(canvas);
  texture.colorSpace = THREE.SRGBColorSpace;
  texture.anisotropy = renderer.capabilities.getMaxAnisotropy();
  return texture;
}

/** The grid's outline on the ground, rings every 10 m, and an arrow ahead. */
function groundLines(grid) {
  const [x0, y0, z] = grid.lower_m;
  const [x1, y1] = grid.upper_m;
  const points = [x0, y0, z, x1, y0, z, x1, y0, z, x1, y1, z, x1, y1, z, x0, y1, z, x0, y1, z, x0, y0, z];
  for (const radius of RANGE_RINGS_M) {
    if (radius > x1) continue;
    for (let k = 0; k < 96; k++) {
      for (const angle of [k, k + 1].map((n) => (2 * Math.PI * n) / 96)) points.push(radius * Math.cos(angle), radius * Math.sin(angle), z);
    }
  }
  points.push(0, 0, z, x1 + 4, 0, z, x1 + 4, 0, z, x1 + 2, 1.2, z, x1 + 4, 0, z, x1 + 2, -1.2, z);
  const geometry = new THREE.BufferGeometry();
  geometry.setAttribute("position", new THREE.BufferAttribute(new Float32Array(points), 3));
  return new THREE.LineSegments(geometry, new THREE.LineBasicMaterial({ fog: false }));
}

/** The recording vehicle as a box, its frame's origin at the rear axle on the ground. */
function egoVehicle() {
  const [length, width, height] = EGO_SIZE_M;
  const parts = [
    [length, width, 0.85, 0, 0.6],
    [0.55 * length, 0.9 * width, height - 0.95, -0.06 * length, 1.3],
  ].map(([l, w, h, ahead, up], k) => {
    const geometry = new THREE.BoxGeometry(l, w, h);
    const light = FACE_LIGHT.flatMap((value) => Array(4 * 3).fill(value));
    geometry.setAttribute("color", new THREE.BufferAttribute(new Float32Array(light), 3));
    const mesh = new THREE.Mesh(geometry, new THREE.MeshBasicMaterial({ vertexColors: true, color: k ? 0x39414b : 0xf1f3f5 }));
    mesh.position.set(length / 2 - EGO_REAR_OVERHANG_M + ahead, 0, up);
    return mesh;
  });
  return parts;
}
