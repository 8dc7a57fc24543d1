// SPDX-License-Identifier: Apache-2.0
// The page: numbers and tables once, and a state (frame, layer, hidden classes, theme) that the viewer follows.
"use strict";

(() => {
  const content = JSON.parse(document.getElementById("content").textContent);
  const { report, grid, frames, classes, differences } = content;
  const records = frames.map((frame) => report.frames[frame.record]);
  const hasTruth = frames.some((frame) => frame.truth);
  const firstNs = Number(records[0] ? records[0].stamp_ns : 0);
  const times = records.map((record) => (Number(record.stamp_ns) - firstNs) / 1e9);
  const $ = (id) => document.getElementById(id);

  const LAYERS = [
    { key: "prediction", name: "Prediction", panes: ["prediction"] },
    ...(hasTruth
      ? [
          { key: "truth", name: "Ground truth", panes: ["truth"] },
          { key: "difference", name: "Difference", panes: ["difference"] },
          { key: "both", name: "Side by side", panes: ["prediction", "truth"] },
        ]
      : []),
  ];
  const VIEWS = [
    { name: "Behind", key: "b", set: (viewer) => viewer.viewFromBehind() },
    { name: "Above", key: "a", set: (viewer) => viewer.viewFromAbove() },
    { name: "Close", key: "c", set: (viewer) => viewer.viewFromClose() },
  ];
  const PANE_NAMES = { prediction: "Prediction", truth: "Ground truth", difference: "Difference, within the camera mask" };
  const CHART_COLORS = ["#1f77d0", "#e0862c", "#c2485a", "#2f9e6e", "#9a6bd0"];

  const state = {
    frame: 0,
    layer: LAYERS[0],
    camera: report.mode.anchor_camera,
    classVisible: classes.map(() => true),
    differenceVisible: differences.map(() => true),
    timer: null,
  };
  const unpacked = new Map(); // "frame/layer" -> promise of voxels
  let viewer = null;
  let charts = [];

  // Small helpers

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name in made && name !== "style") made[name] = value;
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }
  const percent = (value) => (value == null ? "–" : (100 * value).toFixed(1));
  const swatch = (rgb) => element("span", { className: "swatch", style: `background: rgb(${rgb.join(",")})` });
  const cameraName = (camera) => camera.replace(/^CAM_/, "").replace(/_/g, " ").toLowerCase();
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function table(headings, rows, className = "") {
    const head = element("tr", {}, ...headings.map((text) => element("th", {}, text)));
    return element("table", { className }, element("thead", {}, head), element("tbody", {}, ...rows));
  }
  const row = (...cells) => element("tr", {}, ...cells.map((cell) => (cell instanceof HTMLTableCellElement ? cell : element("td", {}, cell))));

  function shareCell(value) {
    const cell = element("td", { className: value == null ? "" : "share" }, percent(value));
    if (value != null) cell.style.setProperty("--share", `${(100 * value).toFixed(2)}%`);
    return cell;
  }

  // What is written once

  function writeHead() {
    const mode = report.mode.name === "lockstep" ? "lockstep" : `real time at rate ${report.mode.rate}`;
    $("title").textContent = `${report.model.name} on ${report.bag.name}`;
    document.title = `${report.model.name} on ${report.bag.name} · replay evaluation`;
    const shown = frames.length < report.frames.length ? `, ${frames.length} of them shown` : "";
    const what = report.keyframes ? "keyframes" : "sets";
    const length = ((report.bag.end_ns - report.bag.start_ns) / 1e9).toFixed(1);
    $("subtitle").textContent = `Replay evaluation, ${mode} · ${report.frames.length} ${what}${shown} · ${length} s of driving · ${report.machine.processor}`;
    $("settings").textContent = report.settings;
    document.body.dataset.mode = report.mode.name;
  }

  function writeNumbers() {
    const number = (id, value, text, kind = "") =>
      $("numbers").append(element("div", { className: `number ${kind}` }, element("b", { id }, value), element("span", {}, text)));
    if (report.scores) {
      const masked = report.scores.camera_mask;
      number("miou", `${percent(masked.miou_17)} %`, "mIoU, 17 classes, camera mask");
      number("geometric", `${percent(masked.geometric_iou)} %`, "IoU, occupied or free");
      if (report.scores.rays) number("rayiou", `${percent(report.scores.rays.ray_iou)} %`, "RayIoU, mean of 1, 2, 4 m");
    }
    const latency = report.latency_ms;
    if (latency.total) {
      number("latency", `${latency.total.p50.toFixed(0)} ms`, `latency, median (95 %: ${latency.total.p95.toFixed(0)} ms)`);
      number("engine", `${latency.engine.p50.toFixed(0)} ms`, "of it in the engine, median");
    }
    const counts = report.keyframes;
    if (counts) number("answered", `${counts.published} / ${counts.in_bag}`, "keyframes answered", counts.missed ? "bad" : "good");
    else number("answered", `${report.sets.processed || 0} / ${report.sets.opened || 0}`, "sets processed");
  }

  function writeClasses() {
    if (!report.scores) {
      const totals = classes.map((_, c) => c);
      $("classes-card").querySelector("h2").textContent = "Classes";
      $("class-table").append(table(["class"], totals.map((c) => row(element("td", {}, swatch(classes[c].rgb), classes[c].name)))));
      $("class-table").append(element("p", { className: "note" }, "Without ground truth there are no scores; give it with --gt."));
      return;
    }
    const parts = [["camera_mask", "IoU, camera mask"], ["no_mask", "IoU, no mask"], ...(report.scores.rays ? [["rays", "RayIoU"]] : [])];
    const keys = Object.keys(report.scores.camera_mask.iou);
    const rows = keys.map((key, c) => {
      const name = element("td", {}, swatch(classes[c].rgb), classes[c].name + (classes[c].moves ? " *" : ""));
      return row(name, ...parts.map(([part]) => shareCell(report.scores[part].iou[key])));
    });
    const mean = (text, key) => {
      const made = row(text, ...parts.map(([part]) => (part === "rays" ? (key === "miou_17" ? percent(report.scores.rays.ray_iou) : "") : percent(report.scores[part][key]))));
      made.className = "mean";
      return made;
    };
    rows.push(mean("mean of 17", "miou_17"), mean("mean of 15", "miou_15"), mean("dynamic", "dynamic_miou"), mean("static", "static_miou"), mean("dynamic as one", "dynamic_iou"), mean("occupied or free", "geometric_iou"));
    $("class-table").append(table(["%", ...parts.map(([, name]) => name)], rows));
    $("class-table").append(element("p", { className: "note" }, "* dynamic. A class that is neither there nor predicted has no score and counts in no mean."));
  }

  function writeDrops() {
    const sets = report.sets;
    const order = ["opened", "complete", "masked", "dropped", "superseded", "undecodable", "failed", "processed", "time_jumps"];
    const names = { opened: "begun by an anchor image", masked: "run with a camera missing", dropped: "dropped as incomplete", superseded: "overtaken by a newer set", failed: "failed in the engine", time_jumps: "jumps in time" };
    const rows = order.filter((key) => sets[key]).map((key) => row(names[key] || key, String(sets[key])));
    $("drops").append(table(["sets", ""], rows));
    const outcomes = [...new Set(Object.values(report.images).flatMap((counts) => Object.keys(counts)))].filter((key) => Object.values(report.images).some((counts) => counts[key]));
    if (outcomes.length) {
      const cameraRows = Object.entries(report.images).map(([camera, counts]) => row(camera, ...outcomes.map((key) => String(counts[key] || 0))));
      $("drops").append(table(["images", ...outcomes.map((key) => key.replace(/_/g, " "))], cameraRows));
    }
    const missed = report.frames.filter((record) => !record.published);
    const resets = Object.entries(report.memory).filter(([key, count]) => key.startsWith("reset ") && count);
    const notes = [
      missed.length ? `${missed.length} keyframes were missed; each counts as predicted free everywhere.` : "No keyframe was missed.",
      resets.length ? `Memory begun or reset: ${resets.map(([key, count]) => `${key.slice(6).replace(/_/g, " ")} ${count}`).join(", ")}.` : "",
    ];
    $("drops").append(element("p", { className: "note" }, notes.join(" ")));
  }

  function writeStages() {
    const rows = Object.entries(report.latency_ms).map(([stage, ms]) => row(stage, ...["p50", "p95", "p99", "max"].map((key) => ms[key].toFixed(1))));
    $("stages").append(table(["ms", "median", "95 %", "99 %", "max"], rows));
    $("stages").append(element("p", { className: "note" }, "decode + wait + engine + publish = total, from the set's last image; receive runs before, from its first image to its last."));
  }

  function writeProvenance() {
    const { model, bag, mode, machine } = report;
    const rows = [
      ["model", `${model.name} (${model.bundle}), engine ${model.engine}`],
      ["bundle.yaml, sha256", model.bundle_yaml_sha256],
      ...Object.entries(model.provenance).map(([key, value]) => [`model: ${key.replace(/_/g, " ")}`, typeof value === "object" ? JSON.stringify(value) : String(value)]),
      ["bag, sha256", `${bag.name}, ${bag.sha256}`],
      ["ground truth", bag.ground_truth],
      ["mode", `${mode.name}${mode.rate ? ` at rate ${mode.rate}` : ""}, anchor ${mode.anchor_camera}`],
      ["node's parameters", JSON.stringify(mode.parameters)],
      ["machine", `${machine.processor}, ${machine.cores} cores, ${machine.memory_gb} GB, ${machine.system}`],
      ["versions", `occflownet ${report.occflownet}, ${Object.entries(machine.versions).map(([k, v]) => `${k} ${v}`).join(", ")}`],
      ["evaluation took", `${report.seconds.toFixed(1)} s`],
    ];
    $("provenance").append(element("table", {}, element("tbody", {}, ...rows.map(([name, text]) => row(name, text)))));
  }

  // What follows the state

  function legendEntries() {
    return state.layer.key === "difference" ? [differences, state.differenceVisible] : [classes, state.classVisible];
  }

  function drawLegend(counts) {
    const [entries, visible] = legendEntries();
    const shown = entries.map((_, k) => k).filter((k) => counts[k] || !visible[k] || entries === differences);
    $("legend").replaceChildren(
      ...shown.map((k) =>
        element(
          "button",
          {
            "aria-pressed": String(visible[k]),
            "data-label": k,
            title: "Click to hide or show, double-click to show it alone",
            onclick: () => toggle(visible, k),
            ondblclick: () => showAlone(visible, k),
          },
          swatch(entries[k].rgb),
          entries[k].name,
          element("em", {}, (counts[k] || 0).toLocaleString("en")),
        ),
      ),
    );
  }

  function toggle(visible, k) {
    visible[k] = !visible[k];
    show();
  }

  function showAlone(visible, k) {
    const isAlone = visible.every((value, i) => value === (i === k));
    visible.forEach((_, i) => (visible[i] = isAlone || i === k));
    show();
  }

  function voxelsOf(frame, layer) {
    const key = `${frame}/${layer}`;
    if (!unpacked.has(key)) {
      const packed = frames[frame][layer];
      if (unpacked.size > 24) unpacked.delete(unpacked.keys().next().value);
      unpacked.set(key, packed ? unpackVoxels(packed, grid.shape) : Promise.resolve(null));
    }
    return unpacked.get(key);
  }

  async function show() {
    const { frame, layer } = state;
    writeFrame();
    const panes = await Promise.all(layer.panes.map((name) => voxelsOf(frame, name)));
    if (frame !== state.frame || layer !== state.layer) return; // the user has gone on meanwhile
    const [entries, visible] = legendEntries();
    const counts = entries.map(() => 0);
    for (const label of panes[0] ? panes[0].label : []) counts[label] += 1;
    drawLegend(counts);
    $("caption-left").textContent = PANE_NAMES[layer.panes[0]];
    $("caption-right").textContent = layer.panes[1] ? PANE_NAMES[layer.panes[1]] : "";
    if (!viewer) return;
    if (viewer.paneCount !== layer.panes.length) viewer.setPaneCount(layer.panes.length);
    panes.forEach((voxels, k) => viewer.setVoxels(k, voxels, entries.map((entry) => entry.rgb), visible));
    document.body.dataset.shown = `${frame}/${layer.key}`;
    document.body.dataset.cubes = panes.map((_, k) => viewer.cubeCount(k)).join(" ");
  }

  function writeFrame() {
    const [frame, record] = [frames[state.frame], records[state.frame]];
    $("time").value = state.frame;
    $("time-text").textContent = `${times[state.frame].toFixed(2)} s · ${state.frame + 1} of ${frames.length}`;
    const isMissing = !record.published && state.layer.panes.includes("prediction");
    $("missed-note").textContent = isMissing ? `Missed: ${record.reason}. Counts as free everywhere.` : "";
    showImages(frame);
    const facts = [
      [report.keyframes ? "keyframe" : "stamp", record.token || `${record.stamp_ns}`],
      ...(record.scores ? [["mIoU, this keyframe", `${percent(record.scores.miou_17)} %`], ["occupied or free", `${percent(record.scores.geometric_iou)} %`]] : []),
      ...(record.scores && record.scores.ray_iou != null ? [["RayIoU", `${percent(record.scores.ray_iou)} %`]] : []),
      ["occupied voxels", record.published ? record.occupied_voxels.toLocaleString("en") : "–"],
      ...(record.latency_ms.total != null ? [["latency, engine", `${record.latency_ms.total.toFixed(0)} ms, ${record.latency_ms.engine.toFixed(0)} ms`]] : []),
    ];
    $("frame-facts").replaceChildren(...facts.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]));
    charts.forEach((chart) => chart.redraw(false));
  }

  function showImages(frame) {
    const fill = (image, source) => {
      image.style.visibility = source ? "visible" : "hidden";
      if (source) image.src = source;
    };
    for (const button of $("cameras").querySelectorAll("button")) {
      const { camera } = button.dataset;
      button.setAttribute("aria-pressed", String(camera === state.camera));
      fill(button.querySelector("img"), frame.images[camera]);
    }
    const large = $("cameras").querySelector(".large");
    fill(large.querySelector("img"), frame.images[state.camera]);
    large.querySelector("figcaption").textContent = cameraName(state.camera);
  }

  function setFrame(frame) {
    state.frame = Math.min(frames.length - 1, Math.max(0, frame));
    show();
  }

  function setLayer(layer) {
    state.layer = layer;
    [...$("layers").children].forEach((button, k) => button.setAttribute("aria-pressed", String(LAYERS[k] === layer)));
    show();
  }

  function setCamera(camera) {
    state.camera = camera;
    showImages(frames[state.frame]);
  }

  function play() {
    if (state.timer) {
      clearInterval(state.timer);
      state.timer = null;
    } else {
      state.timer = setInterval(() => setFrame((state.frame + 1) % frames.length), 500);
    }
    $("play").innerHTML = state.timer ? "&#10073;&#10073;" : "&#9654;";
  }

  function setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    if (viewer) viewer.setTheme(css("--stage"), css("--faint"));
    drawCharts();
  }

  function drawCharts() {
    const colors = { ink: css("--ink"), faint: css("--faint"), grid: css("--grid"), bad: css("--bad") };
    const missed = records.map((record) => !record.published);
    const latency = ["total", "engine", "busy", "decode", "wait"].map((stage, k) => ({ name: stage, color: CHART_COLORS[k], values: records.map((record) => record.latency_ms[stage] ?? null) }));
    charts = [];
    if (latency.some((line) => line.values.some((value) => value != null))) {
      charts.push(lineChart($("latency-chart"), times, latency, missed, colors, () => state.frame, setFrame));
    } else {
      $("latency-chart").textContent = "No latency could be told of single frames.";
    }
    $("score-card").hidden = !report.scores;
    if (!report.scores) return;
    const scored = (key) => records.map((record) => (record.scores && record.scores[key] != null ? 100 * record.scores[key] : null));
    const lines = [["mIoU", "miou_17"], ["occupied or free", "geometric_iou"], ["RayIoU", "ray_iou"]].map(([name, key], k) => ({ name, color: CHART_COLORS[k], values: scored(key) }));
    charts.push(lineChart($("score-chart"), times, lines.filter((line) => line.values.some((value) => value != null)), missed, colors, () => state.frame, setFrame));
  }

  // Building and listening

  function buildControls() {
    LAYERS.forEach((layer, k) =>
      $("layers").append(element("button", { title: `${layer.name} (${k + 1})`, "aria-pressed": String(k === 0), "data-layer": layer.key, onclick: () => setLayer(layer) }, layer.name)),
    );
    VIEWS.forEach((view) => $("views").append(element("button", { title: `${view.name} (${view.key.toUpperCase()})`, "data-view": view.key, onclick: () => viewer && view.set(viewer) }, view.name)));
    const picture = (camera, className = "") => element("figure", { className }, element("img", { alt: `Image of ${camera}` }), element("figcaption", {}, cameraName(camera)));
    $("cameras").append(picture(state.camera, "large"));
    for (const camera of content.cameras) {
      $("cameras").append(element("button", { "data-camera": camera, title: `Show ${camera} large`, onclick: () => setCamera(camera) }, picture(camera)));
    }
    $("time").max = frames.length - 1;
    $("time").addEventListener("input", () => setFrame(Number($("time").value)));
    $("play").addEventListener("click", play);
    $("theme").addEventListener("click", switchTheme);
  }

  const switchTheme = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const onSlider = event.target === $("time");
    const actions = {
      ArrowLeft: () => onSlider || setFrame(state.frame - 1),
      ArrowRight: () => onSlider || setFrame(state.frame + 1),
      Home: () => onSlider || setFrame(0),
      End: () => onSlider || setFrame(frames.length - 1),
      t: switchTheme,
    };
    if (!(event.target instanceof HTMLButtonElement)) actions[" "] = play;
    LAYERS.forEach((layer, k) => (actions[String(k + 1)] = () => setLayer(layer)));
    VIEWS.forEach((view) => (actions[view.key] = () => viewer && view.set(viewer)));
    const action = actions[event.key] || actions[event.key.toLowerCase()];
    if (!action) return;
    if (!onSlider) event.preventDefault();
    action();
  }

  function onPointer(event) {
    const tooltip = $("tooltip");
    const hit = viewer && event.buttons === 0 ? viewer.voxelAt(event.offsetX, event.offsetY) : null;
    tooltip.textContent = "";
    if (!hit) return;
    const [entries] = legendEntries();
    const [x, y, z] = hit.centre_m.map((v) => v.toFixed(1));
    tooltip.textContent = `${entries[hit.label].name} at x ${x}, y ${y}, z ${z} m`;
    tooltip.style.left = `${Math.min(event.offsetX + 14, $("canvas-holder").clientWidth - tooltip.offsetWidth - 6)}px`;
    tooltip.style.top = `${Math.max(event.offsetY - 34, 4)}px`;
  }

  function startViewer() {
    try {
      viewer = new VoxelViewer($("voxels"), grid);
    } catch (error) {
      $("missed-note").textContent = "This browser gives no WebGL, so the voxels cannot be drawn; the numbers below are complete.";
      $("canvas-holder").style.minHeight = "120px";
      $("canvas-holder").style.height = "120px";
      document.body.dataset.webgl = "none";
      return;
    }
    document.body.dataset.webgl = "ready";
    $("voxels").addEventListener("pointermove", onPointer);
    $("voxels").addEventListener("pointerleave", () => ($("tooltip").textContent = ""));
  }

  writeHead();
  writeNumbers();
  writeClasses();
  writeDrops();
  writeStages();
  writeProvenance();
  if (!frames.length) {
    $("explorer").replaceChildren(element("p", { className: "card" }, "Nothing was published, so there is nothing to show."));
    document.querySelector(".columns").hidden = true;
    return;
  }
  buildControls();
  startViewer();
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  show();
  document.addEventListener("keydown", onKey);
  let resizing = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(resizing);
    resizing = requestAnimationFrame(drawCharts);
  });
})();
