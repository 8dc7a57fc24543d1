// SPDX-License-Identifier: Apache-2.0
// Lines over time (uPlot): a click goes to the frame, a line marks the one that is shown, red ticks the missed ones.
"use strict";

/**
 * @param {HTMLElement} holder replaced content.
 * @param {number[]} times seconds, ascending.
 * @param {{name: string, values: (number|null)[], color: string}[]} series lines.
 * @param {boolean[]} missed by frame.
 * @param {{ink: string, faint: string, grid: string, bad: string}} colors of the theme.
 * @param {() => number} current index of the frame that is shown.
 * @param {(index: number) => void} onPick after a click.
 */
function lineChart(holder, times, series, missed, colors, current, onPick) {
  holder.replaceChildren();
  const axis = { stroke: colors.faint, grid: { stroke: colors.grid, width: 1 }, ticks: { stroke: colors.grid, width: 1 }, font: "12px system-ui" };
  const marks = (plot) => {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.lineWidth = devicePixelRatio;
    ctx.strokeStyle = colors.ink;
    const now = Math.round(plot.valToPos(times[current()], "x", true));
    ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(now, bbox.top);
    ctx.lineTo(now, bbox.top + bbox.height);
    ctx.stroke();
    ctx.setLineDash([]);
    ctx.fillStyle = colors.bad;
    missed.forEach((isMissed, k) => {
      if (isMissed) ctx.fillRect(plot.valToPos(times[k], "x", true) - 2 * devicePixelRatio, bbox.top + bbox.height - 9 * devicePixelRatio, 4 * devicePixelRatio, 9 * devicePixelRatio);
    });
    ctx.restore();
  };
  const plot = new uPlot(
    {
      width: holder.clientWidth,
      height: 200,
      scales: { x: { time: false }, y: { range: (_, low, high) => [0, Math.max(high * 1.08, 1e-3)] } },
      axes: [{ ...axis, values: (_, ticks) => ticks.map((t) => `${t} s`) }, { ...axis, size: 52 }],
      cursor: { drag: { x: false, y: false }, y: false },
      series: [
        { label: "time", value: (_, t) => (t == null ? "–" : `${t.toFixed(2)} s`) },
        ...series.map((s) => ({
          label: s.name,
          stroke: s.color,
          width: 1.8,
          points: { show: times.length < 60, size: 5, fill: s.color },
          value: (_, v) => (v == null ? "–" : v.toFixed(1)),
        })),
      ],
      hooks: { draw: [marks] },
    },
    [times, ...series.map((s) => s.values)],
    holder,
  );
  plot.over.addEventListener("click", () => plot.cursor.idx != null && onPick(plot.cursor.idx));
  plot.over.style.cursor = "pointer";
  return plot;
}
