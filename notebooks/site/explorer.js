// The explorer of notebook 15 without a kernel: two tasks, one matrix, one rank; data beside the page.
(() => {
  const place = document.getElementById("explorer");
  const source = document.getElementById("explorer-data");
  if (!place || !source) return;
  const data = JSON.parse(source.textContent);
  const ranks = data.ranks;
  const modules = Object.keys(data.null);
  const measured = Object.values(data.tasks).find((task) => task.energy);
  const layers = measured ? Object.keys(measured.energy[modules[0]]).map(Number).sort((a, b) => a - b) : [];
  const state = {
    tasks: [...data.shown.tasks], module: data.shown.module,
    layer: Math.max(0, layers.indexOf(data.shown.layer)), rank: ranks.indexOf(data.shown.rank),
  };
  const W = 340, H = 190, LEFT = 40, BOTTOM = 34, TOP = 8;

  const element = (tag, attributes = {}, text = "") => {
    const svg = ["svg", "path", "line", "rect", "text", "g"].includes(tag);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
    if (text) made.textContent = text;
    return made;
  };

  const control = (label, input) => {
    const id = `explorer-${label.replace(/ /g, "-")}`;
    const box = element("div", { class: "control" });
    input.id = id;
    box.append(element("label", { for: id }, label), input, element("output", { for: id }));
    return box;
  };

  const choice = (label, options, value, change) => {
    const select = element("select");
    options.forEach(([key, text]) => select.append(element("option", { value: key }, text)));
    select.value = value;
    select.addEventListener("input", () => { change(select.value); draw(); });
    return control(label, select);
  };

  const slider = (label, values, start, change) => {
    const range = element("input", { type: "range", min: 0, max: values.length - 1, step: 1 });
    range.value = start;
    const box = control(label, range);
    const say = () => {
      box.querySelector("output").textContent = values[range.value];
      range.setAttribute("aria-valuetext", values[range.value]);
    };
    range.addEventListener("input", () => { change(Number(range.value)); say(); draw(); });
    say();
    return box;
  };

  const x = (rank) => LEFT + (W - LEFT - 8) * Math.log2(rank) / Math.log2(ranks[ranks.length - 1]);
  const y = (share) => TOP + (H - TOP - BOTTOM) * (1 - share);
  const path = (E) => E.map((share, i) => `${i ? "L" : "M"}${x(ranks[i]).toFixed(1)} ${y(share).toFixed(1)}`).join("");
  const at = (E) => E[Math.min(state.rank, E.length - 1)];

  const curve = (task) => {
    const E = task.energy[state.module][layers[state.layer]], noise = data.null[state.module];
    const words = `E(${ranks[state.rank]}) = ${at(E).toFixed(2)}, noise ${at(noise).toFixed(2)}`;
    const svg = element("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${task.title}: ${words}` });
    for (const share of [0, 0.5, 1]) {
      svg.append(element("line", { class: "grid", x1: LEFT, x2: W - 8, y1: y(share), y2: y(share) }));
      svg.append(element("text", { x: LEFT - 6, y: y(share) + 4, "text-anchor": "end" }, String(share)));
    }
    for (const rank of [1, 8, 64, 512].filter((r) => r <= ranks[ranks.length - 1])) {
      svg.append(element("text", { x: x(rank), y: H - 18, "text-anchor": "middle" }, String(rank)));
    }
    svg.append(element("text", { x: (W + LEFT) / 2, y: H - 3, "text-anchor": "middle" }, "rank r"));
    const here = x(ranks[state.rank]);
    svg.append(element("line", { class: "here", x1: here, x2: here, y1: y(0), y2: y(1) }));
    svg.append(element("path", { class: "noise", d: path(noise) }));
    svg.append(element("path", { class: "energy", d: path(E), stroke: task.color }));
    return [element("p", { class: "number" }, words), svg];
  };

  // Light to dark blue over 0 to 0.8; the chosen matrix is framed.
  const shade = (value) => {
    const t = Math.min(1, Math.max(0, value / 0.8));
    const mix = (a, b) => Math.round(a + (b - a) * t);
    return `rgb(${mix(240, 8)}, ${mix(246, 48)}, ${mix(252, 107)})`;
  };

  const map = (task) => {
    const name = `${task.title}: E(r) over noise at rank ${ranks[state.rank]}, layers by modules`;
    const svg = element("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": name });
    const w = (W - LEFT - 8) / layers.length, h = (H - TOP - BOTTOM) / modules.length;
    let frame = {};
    modules.forEach((module, row) => {
      const text = module.replace("_proj", "");
      svg.append(element("text", { x: LEFT - 6, y: TOP + h * (row + 0.5) + 4, "text-anchor": "end" }, text));
      layers.forEach((layer, column) => {
        const value = at(task.energy[module][layer]) - at(data.null[module]);
        const box = { x: LEFT + w * column, y: TOP + h * row, width: w - 0.5, height: h - 0.5 };
        svg.append(element("rect", { ...box, fill: shade(value), "data-value": value.toFixed(4) }));
        if (module === state.module && column === state.layer) frame = { ...box, class: "chosen" };
      });
    });
    svg.append(element("rect", frame));
    layers.filter((_, i) => i % 4 === 0).forEach((layer) => {
      const middle = LEFT + w * (layers.indexOf(layer) + 0.5);
      svg.append(element("text", { x: middle, y: H - 18, "text-anchor": "middle" }, String(layer)));
    });
    svg.append(element("text", { x: (W + LEFT) / 2, y: H - 3, "text-anchor": "middle" }, "layer"));
    return svg;
  };

  const cut = (name, task) => {
    const rank = ranks[state.rank], found = task.cuts[rank];
    if (!found) return `Cut to rank ${rank}: not measured. utils.cut(utils.tuned("${name}"), [${rank}])`;
    return `Cut to rank ${rank} everywhere: ${found[0].toFixed(2)} nats (full ${task.full[0].toFixed(2)}), ` +
      `score ${found[1].toFixed(1)} (full ${task.full[1].toFixed(1)}, base ${task.base[1].toFixed(1)})`;
  };

  const panels = [element("section", { class: "panel" }), element("section", { class: "panel" })];
  const draw = () => panels.forEach((panel, side) => {
    const name = state.tasks[side], task = data.tasks[name];
    panel.setAttribute("aria-label", task.title);
    const heading = element("h3", {}, task.title);
    if (task.energy) panel.replaceChildren(heading, ...curve(task), map(task), element("p", { class: "cut", "aria-live": "polite" }, cut(name, task)));
    else panel.replaceChildren(heading, element("p", { class: "cut" }, `Not measured: run ${task.missing}`));
  });

  const names = Object.entries(data.tasks).map(([key, task]) => [key, task.title]);
  const controls = element("div", { class: "controls" });
  controls.append(
    choice("first task", names, state.tasks[0], (value) => { state.tasks[0] = value; }),
    choice("second task", names, state.tasks[1], (value) => { state.tasks[1] = value; }),
    choice("module", modules.map((m) => [m, m]), state.module, (value) => { state.module = value; }),
    slider("layer", layers, state.layer, (value) => { state.layer = value; }),
    slider("rank", ranks, state.rank, (value) => { state.rank = value; }),
  );
  const row = element("div", { class: "panels" });
  row.append(...panels);
  place.append(controls, row);
  draw();
})();
