"use strict";
(async () => {
  const facts = JSON.parse(document.getElementById("payload").textContent);
  const byId = (id) => document.getElementById(id);
  const told = byId("told");
  const say = (text, wrong = false) => { told.textContent = text; told.classList.toggle("wrong", wrong); };
  const { genes, n_spots: nSpots, barcodes, groups, table } = facts;

  // Matrices [G, N]: base64 of deflated integers, times a step a gene.
  async function unpack({ type, step, data }) {
    const packed = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const buffer = await new Response(stream).arrayBuffer();
    return { values: type === "uint16" ? new Uint16Array(buffer) : new Uint32Array(buffer), step };
  }
  const names = Object.keys(facts.matrices);
  const unpacked = await Promise.all(names.map((name) => unpack(facts.matrices[name])));
  const matrices = Object.fromEntries(names.map((name, i) => [name, unpacked[i]]));

  // Mean over genes [g, ...] of a matrix: Float64Array [N].
  function column(name, members) {
    if (!(name in matrices)) return null;
    const { values, step } = matrices[name];
    const sum = new Float64Array(nSpots);
    for (const gene of members) {
      const at = gene * nSpots;
      for (let i = 0; i < nSpots; i++) sum[i] += values[at + i] * step[gene] / members.length;
    }
    return sum;
  }

  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const model = (name) => {
    for (const each of window.Bokeh.documents) {
      const found = each.get_model_by_name(name);
      if (found) return found;
    }
    return null;
  };
  while (!(window.Bokeh && Bokeh.documents.length && model("spots"))) await wait(20);
  const source = model("spots"), xRange = model("x_range"), yRange = model("y_range");
  const panels = ["measured", "predicted", "difference", "uncertainty"].filter((p) => model(`map_${p}`));
  const plots = panels.map((panel) => model(`map_${panel}`));

  const state = { members: [0], label: genes[0], gene: 0 };
  const setting = (id, other) => (byId(id) ? byId(id).value : other);

  function largest(...columns) {
    let top = 0;
    for (const values of columns) if (values) for (const v of values) if (v > top) top = v;
    return top;
  }

  function number(value) {
    if (value === null || Number.isNaN(value)) return "–";
    if (Number.isInteger(value)) return String(value);
    return value.toFixed(value < 10 ? 2 : 1);
  }

  function draw() {
    const { members, label, gene } = state;
    const single = members.length === 1;
    const log = setting("scale", "log") === "log";
    const scaled = (values) => (log ? values.map((v) => Math.log2(1 + v)) : values);
    const unit = log ? "log2(1 + count)" : "counts";
    const measured = column("measured", members);
    const predicted = column(setting("shown", "counts"), members) || column("counts", members);
    const low = single ? column("low", members) : null, high = single ? column("high", members) : null;
    const zero = single ? column("zero", members) : null;
    const blank = new Float64Array(nSpots).fill(NaN);
    const kind = setting("uncertainty", "");
    const width = low && high ? high.map((v, i) => v - low[i]) : null;
    const seen = {
      predicted: scaled(predicted),
      measured: measured && scaled(measured),
      uncertainty: kind === "zero" ? zero : width && scaled(width),
    };
    seen.difference = measured && seen.predicted.map((v, i) => v - seen.measured[i]);
    const top = Math.max(largest(seen.measured, seen.predicted), log ? 1 : 1e-6);
    const limits = { measured: [0, top], predicted: [0, top] };
    if (seen.difference) {
      const reach = Math.max(largest(seen.difference, seen.difference.map((v) => -v)), 1e-6);
      limits.difference = [-reach, reach];
    }
    limits.uncertainty = [0, kind === "zero" ? 1 : largest(seen.uncertainty) || 1];
    const units = { measured: unit, predicted: unit, difference: `predicted - measured, ${unit}`,
      uncertainty: kind === "zero" ? "probability of zero" : log ? "log2(1 + width in counts)" : "width, counts" };
    const palette = facts.palettes[setting("palette", "viridis")];
    for (const panel of panels) {
      const mapper = model(`colours_${panel}`);
      [mapper.low, mapper.high] = limits[panel];
      if (panel !== "difference") mapper.palette = palette;
      model(`bar_${panel}`).title = units[panel];
      const shown = panel === "predicted" && byId("shown") ? byId("shown").selectedOptions[0].textContent : panel;
      model(`map_${panel}`).title.text = `${label}: ${panel === "uncertainty" && !single ? "for single genes" : shown}`;
    }
    const text = (values) => Array.from(values || blank, number);
    source.data = {
      ...source.data,
      barcode: barcodes,
      measured: text(measured), predicted: text(predicted), zero: text(zero),
      interval: low && high ? Array.from(low, (v, i) => `${number(v)} to ${number(high[i])}`) : Array(nSpots).fill("–"),
      ...Object.fromEntries(Object.entries(seen).map(([name, values]) => [`v_${name}`, values || blank])),
    };
    const mean = (values) => values.reduce((a, b) => a + b, 0) / nSpots;
    const words = [single ? label : `${label}, ${members.length} genes`, `mean predicted ${number(mean(predicted))}`];
    if (measured) words.push(`mean measured ${number(mean(measured))}`);
    const other = setting("shown", "counts") !== facts.scored ? ` of the ${{ mean: "expected", counts: "generated" }[facts.scored]} count` : "";
    if (single && table.PCC) words.push(`PCC${other} ${table.PCC[gene] === null ? "undefined" : table.PCC[gene].toFixed(3)}`);
    say(words.join(" · "));
    for (const row of byId("genes").tBodies[0].rows) row.classList.toggle("chosen", row.dataset.gene === String(single ? gene : -1));
    for (const box of document.querySelectorAll(".groups button")) {
      box.classList.toggle("chosen", box.dataset.label === label);
    }
  }

  function chooseGene(gene) {
    Object.assign(state, { members: [gene], label: genes[gene], gene });
    byId("gene").value = genes[gene];
    draw();
  }

  function chooseGroup(members, label) {
    if (members.length === 1) return chooseGene(members[0]);
    Object.assign(state, { members, label, gene: -1 });
    byId("gene").value = "";
    draw();
  }

  // Names may differ in case alone: as it is typed first.
  const place = (text) => {
    const exact = genes.indexOf(text);
    return exact >= 0 ? exact : genes.findIndex((name) => name.toLowerCase() === text.toLowerCase());
  };
  const typed = byId("gene");
  typed.addEventListener("input", () => {
    const found = place(typed.value.trim());
    if (found >= 0) chooseGene(found);
  });
  typed.addEventListener("change", () => {
    const text = typed.value.trim();
    if (text && place(text) < 0) {
      const near = genes.filter((name) => name.toLowerCase().includes(text.toLowerCase()));
      if (near.length === 1) chooseGene(place(near[0]));
      else say(`No gene ${typed.value.trim()} here${near.length ? `; perhaps ${near.slice(0, 5).join(", ")}` : ""}.`, true);
    }
  });
  typed.addEventListener("focus", () => typed.select());
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["shown", "uncertainty", "scale", "palette"]) if (byId(id)) byId(id).addEventListener("change", draw);

  // A table of the genes: a click on a head sorts, on a name shows the gene.
  const titles = Object.keys(table);
  let sorting = { title: titles.includes("PCC") ? "PCC" : titles[0], rising: false };
  function fillTable() {
    const { title, rising } = sorting, wanted = byId("search").value.trim().toLowerCase();
    const worth = (i) => (title === "gene" ? genes[i] : table[title][i]);
    const order = genes.map((_, i) => i).filter((i) => genes[i].toLowerCase().includes(wanted));
    order.sort((a, b) => {
      const [u, v] = [worth(a), worth(b)];
      if (u === null || v === null) return (u === null) - (v === null); // the undefined last
      return (u < v ? -1 : u > v ? 1 : 0) * (rising ? 1 : -1) || a - b;
    });
    const head = document.createElement("tr");
    for (const each of ["gene", ...titles]) {
      const cell = document.createElement("th"), button = document.createElement("button");
      cell.scope = "col";
      cell.setAttribute("aria-sort", each !== title ? "none" : rising ? "ascending" : "descending");
      button.type = "button";
      button.textContent = each + (each === title ? (rising ? " ▲" : " ▼") : "");
      button.addEventListener("click", () => {
        sorting = { title: each, rising: each === title ? !rising : each === "gene" };
        fillTable();
        byId("genes").tHead.querySelectorAll("button")[["gene", ...titles].indexOf(each)].focus();
      });
      cell.append(button);
      head.append(cell);
    }
    byId("genes").tHead.replaceChildren(head);
    byId("genes").tBodies[0].replaceChildren(...order.map((i) => {
      const row = document.createElement("tr"), first = document.createElement("td"), button = document.createElement("button");
      row.dataset.gene = String(i);
      row.classList.toggle("chosen", state.gene === i);
      button.type = "button";
      button.textContent = genes[i];
      button.addEventListener("click", () => { chooseGene(i); byId("h-maps").scrollIntoView({ block: "start" }); });
      first.append(button);
      row.append(first, ...titles.map((each) => {
        const cell = document.createElement("td"), value = table[each][i];
        cell.textContent = value === null ? "–" : each.startsWith("mean") ? number(value) : value.toFixed(3);
        return cell;
      }));
      return row;
    }));
  }
  byId("search").addEventListener("input", fillTable);

  // Groups: a row a scale, as wide as the panel; the colour is the mean PCC of the genes where it is known.
  function fillGroups() {
    if (!byId("groups")) return;
    const pcc = table.PCC;
    const palette = facts.palettes.cividis;
    groups.forEach((row, k) => {
      const line = document.createElement("div");
      row.forEach((members, t) => {
        const box = document.createElement("button");
        const known = pcc ? members.map((g) => pcc[g]).filter((v) => v !== null) : [];
        const mean = known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
        const label = members.length === 1 ? genes[members[0]] : `scale ${k + 1}, group ${t + 1}`;
        const shade = mean === null ? 128 : Math.round(255 * Math.min(1, Math.max(0, mean)));
        box.type = "button";
        box.dataset.label = label;
        box.style.flexGrow = String(members.length);
        box.style.background = mean === null ? "#c9ced6" : palette[shade];
        box.style.color = shade > 140 || mean === null ? "#222" : "#fff";
        const list = members.slice(0, 8).map((g) => genes[g]).join(", ") + (members.length > 8 ? ", …" : "");
        box.title = `${label}: ${list}` + (mean === null ? "" : ` (mean PCC ${mean.toFixed(3)})`);
        box.setAttribute("aria-label", box.title);
        if (row.length <= 12) box.textContent = String(members.length);
        if (members.length === 1 && row.length > 50) box.tabIndex = -1; // genes are reached by name
        box.addEventListener("click", () => chooseGroup(members, label));
        line.append(box);
      });
      byId("groups").append(line);
    });
  }

  // Ranges: linked over the maps; a unit is as long across as down, whatever the page's width.
  const home = { x: [xRange.start, xRange.end], y: [yRange.start, yRange.end] };
  let untouched = "";
  function fit(centerX, centerY, spanX) {
    const plot = plots.find((each) => each.inner_width > 0 && each.inner_height > 0);
    if (!plot) return;
    const spanY = spanX * plot.inner_height / plot.inner_width;
    xRange.setv({ start: centerX - spanX / 2, end: centerX + spanX / 2 });
    yRange.setv({ start: centerY + spanY / 2, end: centerY - spanY / 2 });
  }
  function whole() {
    const plot = plots.find((each) => each.inner_width > 0 && each.inner_height > 0);
    if (!plot) return;
    const [x, y] = [home.x[1] - home.x[0], home.y[0] - home.y[1]];
    const span = Math.max(x, y * plot.inner_width / plot.inner_height);
    fit((home.x[0] + home.x[1]) / 2, (home.y[0] + home.y[1]) / 2, span);
    untouched = [xRange.start, xRange.end].join();
  }
  const middle = () => [(xRange.start + xRange.end) / 2, (yRange.start + yRange.end) / 2, xRange.end - xRange.start];
  function zoom(factor) { const [x, y, span] = middle(); fit(x, y, span * factor); }
  function move(right, down) { const [x, y, span] = middle(); fit(x + right * span, y + down * span, span); }
  byId("zoom-in").addEventListener("click", () => zoom(1 / 1.5));
  byId("zoom-out").addEventListener("click", () => zoom(1.5));
  byId("whole").addEventListener("click", whole);
  byId("maps").addEventListener("keydown", (event) => {
    const act = { ArrowLeft: () => move(-0.1, 0), ArrowRight: () => move(0.1, 0), ArrowUp: () => move(0, -0.1),
      ArrowDown: () => move(0, 0.1), "+": () => zoom(1 / 1.5), "=": () => zoom(1 / 1.5), "-": () => zoom(1.5), "0": whole }[event.key];
    if (act) { act(); event.preventDefault(); }
  });
  const narrow = window.matchMedia("(max-width: 600px)");
  function adapt() { // on a narrow page a finger scrolls the page, not the map
    for (const plot of plots) {
      plot.height = narrow.matches ? 330 : 430;
      plot.toolbar.active_drag = narrow.matches ? null : "auto";
      plot.toolbar.active_scroll = narrow.matches ? null : plot.toolbar.tools.find((tool) => tool.type.endsWith("WheelZoomTool"));
    }
  }
  adapt();
  narrow.addEventListener("change", adapt);
  let size = "";
  new ResizeObserver(() => setTimeout(() => {
    const plot = plots.find((each) => each.inner_width > 0);
    const now = plot ? `${plot.inner_width}x${plot.inner_height}` : "";
    if (!now || now === size) return;
    size = now;
    if (!untouched || untouched === [xRange.start, xRange.end].join()) whole();
    else fit(...middle());
  }, 60)).observe(byId("maps"));

  const alpha = (prefix, key, id) => {
    const set = () => { for (const p of panels) { const one = model(`${prefix}_${p}`); if (one) one.glyph[key] = { value: Number(byId(id).value) }; } };
    byId(id).addEventListener("input", set);
    set();
  };
  alpha("spots", "fill_alpha", "spot-alpha");
  alpha("tissue", "global_alpha", "tissue-alpha");

  fillGroups();
  fillTable();
  const best = table.PCC ? table.PCC.map((v, i) => [v === null ? -2 : v, i]).sort((a, b) => b[0] - a[0])[0][1] : 0;
  chooseGene(facts.first ? genes.indexOf(facts.first) : best);
  for (let tries = 0; tries < 100 && !plots.some((each) => each.inner_width > 0); tries++) await wait(20);
  whole();
  document.body.dataset.ready = "yes";
})();
