// SPDX-License-Identifier: Apache-2.0
// What of three.js the viewer uses. three.min.js is made of it (three 0.187.0, esbuild 0.28.2):
//   npm install three esbuild && npx esbuild three_entry.js --bundle --minify --format=iife --global-name=THREE \
//     --legal-comments=inline --outfile=three.min.js
export {
  BoxGeometry,
  BufferAttribute,
  BufferGeometry,
  CanvasTexture,
  Color,
  EdgesGeometry,
  Fog,
  InstancedBufferAttribute,
  InstancedMesh,
  LineBasicMaterial,
  LineSegments,
  Mesh,
  MeshBasicMaterial,
  PerspectiveCamera,
  Scene,
  SRGBColorSpace,
  Vector3,
  WebGLRenderer,
} from "three";
export { OrbitControls } from "three/addons/controls/OrbitControls.js";
