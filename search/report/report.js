"use strict";
// All that is shown of DATA goes through textContent: it is written by models and by strangers.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const MANY = 120;
const $ = (id) => document.getElementById(id);

/** An element with a class and children; strings become text. */
function el(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((c) => c !== null));
  return node;
}

function shape(tag, attributes, className) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (className) node.setAttribute("class", className);
  return node;
}

const number = (x) => (x === null || x === undefined ? "–" : x.toFixed(3).replace(/^(-?)0\./, "$1.").replace("-", "−"));
const change = (a, b) => {
  if (a === null || b === null || a === undefined || b === undefined) return "–";
  const d = b - a;
  if (Math.abs(d) < 0.0005) return "0";
  return `${d < 0 ? "−" : "+"}${Math.abs(d).toFixed(3).replace(/^0\./, ".")}`;
};
const shown = (text) => (text === null || text === "" ? el("i", "", text === null ? "none" : "empty") : text);

function table(rows) {
  if (!rows.length) return el("p", "", "None.");
  const head = el("tr", "", ...Object.keys(rows[0]).map((k) => el("th", "", k)));
  const cellOf = (v) => el("td", /^[\d+\-–.<>= ]*(\[|$)/.test(v) ? "" : "wrapped", v === "nan" ? "–" : v);
  const body = rows.map((row) => el("tr", "", ...Object.values(row).map(cellOf)));
  return el("table", "", el("thead", "", head), el("tbody", "", ...body));
}

// -- what is looked at ---------------------------------------------------------------------------

const state = { view: 0, problem: null };
const view = () => DATA.views[state.view];
const search = () => DATA.searches[view().search];

/** One problem under the view: its final set cut to N, and the pick. */
function outcome(index) {
  const problem = search().problems[index];
  const candidates = problem.candidates.slice(0, view().n);
  const at = view().picked[index];
  const picked = candidates[at] ? at : null;
  const right = picked !== null && candidates[picked].correct;
  return { problem, candidates, picked, right, found: candidates.some((c) => c.correct) };
}

const WANTED = {
  all: () => true,
  wrong: (o) => !o.right,
  missed: (o) => !o.right && o.found,
  right: (o) => o.right,
};

/** Indices of the problems that the filter lets through. */
function visible() {
  return search().problems.map((_, i) => i).filter((i) => WANTED[$("filter").value](outcome(i)));
}

function options(select, values, chosen) {
  select.replaceChildren(
    ...values.map((v) => {
      const option = el("option", "", String(v));
      option.selected = v === chosen;
      return option;
    }),
  );
}

/** Look at the view nearest to what was asked for. */
function choose(method, n, seed) {
  const near = (v) => (v.seed === seed ? 0 : 0.5) + Math.abs(Math.log2(v.n) - Math.log2(n));
  const own = DATA.views.map((v, i) => i).filter((i) => DATA.views[i].method === method);
  own.sort((a, b) => near(DATA.views[a]) - near(DATA.views[b]));
  state.view = own[0];
  const same = own.map((i) => DATA.views[i]);
  const unique = (values) => [...new Set(values)].sort((a, b) => a - b);
  options($("method"), [...new Set(DATA.views.map((v) => v.method))], method);
  options($("n"), unique(same.map((v) => v.n)), view().n);
  options($("seed"), unique(same.filter((v) => v.n === view().n).map((v) => v.seed)), view().seed);
  draw();
}

function draw() {
  const problems = search().problems;
  const list = visible();
  const outcomes = problems.map((_, i) => outcome(i));
  const right = outcomes.filter((o) => o.right).length;
  const missed = outcomes.filter((o) => !o.right && o.found).length;
  $("tally").textContent =
    `${right} of the ${problems.length} held here are right` +
    (missed ? `, of ${missed} more the final set holds a right answer` : "");
  let at = problems.findIndex((p) => p.id === state.problem);
  if (!list.includes(at)) at = list.length ? list[0] : -1;
  $("list").replaceChildren(
    ...list.map((i) => {
      const { problem, right } = outcomes[i];
      const mark = el("span", right ? "right" : "wrong", right ? "✓" : "✗");
      mark.setAttribute("aria-label", right ? "right" : "wrong");
      const button = el("button", "", mark, " ", el("span", "text", problem.question.slice(0, 80)), " ", el("small", "text", problem.id));
      button.type = "button";
      if (i === at) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => go(i));
      return button;
    }),
  );
  if (at < 0) {
    $("problem").replaceChildren(el("p", "", "No problem held here is of this kind."));
    return;
  }
  state.problem = problems[at].id;
  const place = new URLSearchParams({ view: state.view, problem: state.problem, show: $("filter").value });
  history.replaceState(null, "", `#${place}`);
  $("problem").replaceChildren(...problemParts(outcomes[at], list, at));
  const current = $("list").querySelector("[aria-current]");
  // Not scrollIntoView, which would move the page as well.
  $("list").scrollTop = current.offsetTop - $("list").offsetTop - 80;
  $("list").scrollLeft = current.offsetLeft - $("list").offsetLeft - 40;
}

function go(index) {
  state.problem = search().problems[index].id;
  draw();
  if ($("problem").getBoundingClientRect().top < 0) $("problem").scrollIntoView();
}

function step(by) {
  const list = visible();
  const at = list.findIndex((i) => search().problems[i].id === state.problem);
  const next = list[at + by];
  if (next !== undefined) go(next);
}

// -- one problem ---------------------------------------------------------------------------------

function problemParts(found, list, index) {
  const { problem, candidates, picked, right } = found;
  const at = list.indexOf(index);
  const turn = (label, by, key) => {
    const button = el("button", "", label);
    button.type = "button";
    button.title = `key ${key}`;
    button.disabled = list[at + by] === undefined;
    button.addEventListener("click", () => step(by));
    return button;
  };
  const verdict = el("span", right ? "badge right" : "badge wrong", right ? "✓ right" : "✗ wrong");
  const missed = !right && found.found ? el("span", "badge", "a right answer is in the final set") : null;
  const facts = [
    ["Gold answer", shown(problem.gold)],
    ["Picked answer", picked === null ? el("i", "", "nothing finished") : shown(candidates[picked].answer)],
    ["Picked by", view().pick],
    ...Object.entries(problem.spent).map(([name, value]) => [name[0].toUpperCase() + name.slice(1), String(value)]),
  ];
  const parts = [
    el("div", "head", el("h3", "text", problem.id), verdict, missed, el("span", "turn", turn("← previous", -1, "k"), turn("next →", 1, "j"))),
    el("p", "question text", problem.question),
    el("dl", "", ...facts.map(([name, value]) => el("div", "", el("dt", "", name), el("dd", "text", value)))),
    problem.error === null ? null : el("p", "error text", `Failed, counts as wrong: ${problem.error}`),
    ...finalSet(found),
  ];
  if (problem.steps.length) parts.push(...treeParts(found));
  parts.push(el("details", "", el("summary", "", "Settings of the search"), el("pre", "text", `${search().file}\n${search().settings}`)));
  return parts.filter((p) => p !== null);
}

/** The final set in its order, but for the pick, which comes first. */
function finalSet({ problem, candidates, picked }) {
  if (!candidates.length) return [el("p", "", "No candidate is left.")];
  const columns = search().columns;
  const inTree = problem.steps.length > 0;
  const head = el("tr", "", el("th", "", "#"), el("th", "", "answer"), el("th", "", ""), ...columns.map((c) => el("th", "value", c.name)), inTree ? null : el("th", "", "solution"));
  const rows = candidates.map((c, i) => {
    const marks = el("td", "state", el("span", c.correct ? "right" : "wrong", c.correct ? "✓ right" : c.finished ? "✗ wrong" : "✗ cut by the length cap"));
    if (i === picked) marks.prepend(el("span", "badge chosen", "★ picked"), " ");
    const values = columns.map((column, h) => labelled("value", column.name, number(c.q[h])));
    const row = el("tr", i === picked ? "picked" : "", el("td", "", String(i + 1)), el("td", "text", shown(c.answer)), marks, ...values, inTree ? null : el("td", "", el("div", "text solution", c.text)));
    if (c.step !== null) {
      row.classList.add("link");
      row.addEventListener("click", () => select(c.step, true));
    }
    return row;
  });
  rows.unshift(...rows.splice(picked ?? 0, 1));
  const count = `${candidates.length} ${inTree ? "in the final set" : "independent solutions"}`;
  return [el("h4", "", count, " ", el("span", "note", "values after the last step")), el("div", inTree ? "scroll limited" : "scroll", el("table", "final", el("thead", "", head), el("tbody", "", ...rows)))];
}

function labelled(className, label, ...children) {
  const cell = el("td", className, ...children);
  cell.dataset.label = label;
  return cell;
}

// -- the tree ------------------------------------------------------------------------------------

/** Steps as objects, with what follows from the final set. */
function nodesOf({ problem, candidates, picked }) {
  const nodes = problem.steps.map(([parent, places, finished, score, text, q], i) => ({
    i, parent, places, finished, score, text, q, children: [], final: [], chosen: false, lasting: false,
    depth: 0,
  }));
  const first = [];
  for (const node of nodes) {
    const parent = nodes[node.parent];
    node.depth = parent ? parent.depth + 1 : 1;
    (parent ? parent.children : first).push(node);
  }
  candidates.forEach((c, k) => {
    if (c.step === null) return;
    nodes[c.step].final.push(k);
    for (let at = nodes[c.step]; at; at = nodes[at.parent]) {
      at.lasting = true;
      if (k === picked) at.chosen = true;
    }
  });
  return { nodes, first };
}

function stateOf(node, found) {
  if (node.final.includes(found.picked)) return ["★ picked", "chosen"];
  if (node.final.length) return [node.final.length > 1 ? `final set ×${node.final.length}` : "final set", "kept"];
  if (!node.places) return ["pruned", "pruned"];
  if (node.finished) return ["finished, dropped later", "pruned"];
  const many = node.places > 1 ? ` ×${node.places}` : "";
  return node.children.length ? [`kept${many}`, "kept"] : [`kept${many}, no child left`, "kept"];
}

let current = null; // of the tree that is shown

function select(index, scroll) {
  const { nodes, rows, marks } = current;
  for (const node of nodes) {
    rows[node.i].classList.remove("on-path", "selected");
    marks[node.i].forEach((m) => m.classList.remove("on-path"));
  }
  for (let at = nodes[index]; at; at = nodes[at.parent]) {
    rows[at.i].classList.add("on-path");
    rows[at.i].hidden = false;
    marks[at.i].forEach((m) => m.classList.add("on-path"));
  }
  rows[index].classList.add("selected");
  if (scroll) rows[index].scrollIntoView({ block: "center" });
}

function treeParts(found) {
  const { nodes, first } = nodesOf(found);
  const rounds = Math.max(...nodes.map((n) => n.depth));
  current = { nodes, rows: [], marks: [] };
  const { drawing, marks } = drawn(nodes, rounds, found);
  current.marks = marks;
  const list = rowsOf(nodes, first, rounds, found);
  const kept = nodes.filter((n) => n.places).length;
  const show = el("select", "");
  const kinds = { all: "all", kept: "kept", lasting: "on a path of the final set" };
  for (const [value, label] of Object.entries(kinds)) {
    const option = el("option", "", label);
    option.value = value;
    show.append(option);
  }
  show.value = nodes.length > MANY ? "kept" : "all";
  const filter = () => {
    for (const n of nodes) {
      const wanted = show.value === "all" || (show.value === "kept" ? n.places > 0 : n.lasting);
      current.rows[n.i].hidden = !wanted;
    }
  };
  show.addEventListener("change", filter);
  filter();
  const legend = el(
    "p", "note legend",
    key("circle kept", "kept (the fuller its colour, the higher Q)"), key("circle", "pruned"),
    key("square kept", "finished"), key("line", "path of the pick"),
  );
  return [
    el("h4", "", `${nodes.length} steps in ${rounds} rounds, ${kept} kept`),
    drawing,
    legend,
    el("p", "note", el("label", "", "Steps ", show), " A is the change of Q over the step."),
    list,
  ];
}

function key(className, text) {
  return el("span", "", el("span", `key ${className}`), ` ${text}`);
}

/** Index of the column whose Q colours a node: the first that has an advantage. */
const colouring = () => Math.max(0, search().columns.findIndex((c) => c.advantage));

function drawn(nodes, rounds, found) {
  const byRound = Array.from({ length: rounds }, (_, r) => nodes.filter((n) => n.depth === r + 1));
  const most = Math.max(...byRound.map((r) => r.length));
  const pitch = most > 40 ? 9 : 13;
  const across = Math.max(44, Math.min(96, 900 / rounds));
  const height = most * pitch + 28;
  const width = rounds * across + 90;
  const y = new Map();
  const x = (n) => 16 + n.depth * across;
  const middle = height / 2 + 6;
  const root = { x: 16, y: middle };
  const above = (n) => (nodes[n.parent] ? y.get(n.parent) : middle);
  for (const round of byRound) {
    // In the order of their parents edges hardly cross.
    [...round].sort((a, b) => above(a) - above(b) || b.score - a.score || a.i - b.i).forEach((n, k) => {
      y.set(n.i, middle + (k - (round.length - 1) / 2) * pitch);
    });
  }
  const picture = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  picture.setAttribute("aria-label", `Search tree of ${nodes.length} steps in ${rounds} rounds; the table below lists them`);
  const edges = shape("g", {}, "edges");
  const dots = shape("g", {}, "dots");
  const marks = nodes.map((n) => {
    const from = nodes[n.parent] ? { x: x(nodes[n.parent]), y: y.get(n.parent) } : root;
    const to = { x: x(n), y: y.get(n.i) };
    const bend = (from.x + to.x) / 2;
    const kind = `${n.places ? "kept" : "pruned"}${n.chosen ? " chosen" : ""}`;
    const edge = shape("path", { d: `M${from.x} ${from.y}C${bend} ${from.y} ${bend} ${to.y} ${to.x} ${to.y}` }, kind);
    const r = n.places ? 4.5 : 3;
    const dot = n.finished
      ? shape("rect", { x: to.x - r, y: to.y - r, width: 2 * r, height: 2 * r }, kind)
      : shape("circle", { cx: to.x, cy: to.y, r }, kind);
    if (n.places) dot.style.setProperty("--q", n.q[colouring()] ?? 0);
    const title = shape("title", {});
    title.textContent = `step ${n.depth}: ${n.text}\nscore ${number(n.score)}, ${stateOf(n, found)[0]}`;
    dot.append(title);
    dot.addEventListener("click", () => select(n.i, true));
    (n.chosen ? edges.append(edge) : edges.prepend(edge));
    dots.append(dot);
    if (n.final.length) {
      const right = found.candidates[n.final[0]].correct;
      const label = shape("text", { x: to.x + 9, y: to.y + 4 }, right ? "right" : "wrong");
      label.textContent = `${right ? "✓" : "✗"}${n.final.includes(found.picked) ? " picked" : ""}`;
      dots.append(label);
    }
    return [edge, dot];
  });
  dots.append(shape("circle", { cx: root.x, cy: root.y, r: 5 }, "root"));
  for (let r = 0; r <= rounds; r += 1) {
    const label = shape("text", { x: 16 + r * across, y: 11 }, "round");
    label.textContent = r ? String(r) : "step 0";
    picture.append(label);
  }
  picture.append(edges, dots);
  const frame = el("div", "scroll picture", picture);
  frame.tabIndex = 0;
  return { drawing: frame, marks };
}

function rowsOf(nodes, first, rounds, found) {
  const columns = search().columns;
  const head = [el("th", "", "step")];
  for (const c of columns) {
    head.push(el("th", "value", c.advantage ? `Q ${c.name}` : c.name));
    if (c.advantage) head.push(el("th", "value", "A"));
  }
  head.push(el("th", "value", "score"), el("th", "", ""));
  const values = (q, before) =>
    columns.flatMap((c, h) => {
      const cells = [labelled("value", c.advantage ? `Q ${c.name}` : c.name, number(q && q[h]))];
      if (c.advantage) {
        const a = before === null ? "" : change(before && before[h], q[h]);
        cells.push(labelled(`value ${a[0] === "+" ? "up" : a[0] === "−" ? "down" : ""}`, `A ${c.name}`, a));
      }
      return cells;
    });
  const root = found.problem.root;
  const rows = [el("tr", "root", el("td", "step", el("span", "count", "0"), el("i", "", "the problem")), ...values(root, null), labelled("value", "score", ""), el("td", "state", ""))];
  const add = (node) => {
    const [label, kind] = stateOf(node, found);
    const before = node.parent < 0 ? root : nodes[node.parent].q;
    const cell = el("td", "step", el("span", "count", String(node.depth)), el("span", "text", shown(node.text)));
    cell.style.setProperty("--depth", Math.min(node.depth, 40));
    const ends = node.final.map((k) => found.candidates[k]);
    const verdict = ends.length ? el("span", ends[0].correct ? "right" : "wrong", ends[0].correct ? " ✓ right" : " ✗ wrong") : null;
    const row = el("tr", `${node.places ? "kept" : "pruned"}${node.chosen ? " chosen" : ""}`, cell, ...values(node.q, before), labelled("value", "score", number(node.score)), el("td", "state", el("span", kind, label), verdict));
    row.addEventListener("click", () => select(node.i, false));
    current.rows[node.i] = row;
    rows.push(row);
    [...node.children].sort((a, b) => b.chosen - a.chosen || (b.places > 0) - (a.places > 0) || b.score - a.score || a.i - b.i).forEach(add);
  };
  [...first].sort((a, b) => b.chosen - a.chosen || (b.places > 0) - (a.places > 0) || b.score - a.score || a.i - b.i).forEach(add);
  const body = el("table", "tree", el("thead", "", el("tr", "", ...head)), el("tbody", "", ...rows));
  body.style.setProperty("--indent", `${Math.max(3, Math.min(16, 220 / rounds))}px`);
  return el("div", "scroll", body);
}

// -- start ---------------------------------------------------------------------------------------

function fromHash() {
  const place = new URLSearchParams(location.hash.slice(1));
  const wanted = DATA.views[Number(place.get("view"))];
  if (!place.has("view") || !wanted) return false;
  if (WANTED[place.get("show")]) $("filter").value = place.get("show");
  state.problem = place.get("problem");
  choose(wanted.method, wanted.n, wanted.seed);
  return true;
}

$("title").textContent = `Search report: ${DATA.title}`;
document.title = `${DATA.title} - search report`;
$("result-table").append(table(DATA.results));
$("paired").hidden = !DATA.differences.length;
$("difference-table").append(table(DATA.differences));
$("headline").hidden = !DATA.headline;
$("headline").textContent = DATA.headline;
$("ratios").hidden = !DATA.ratios.length;
$("ratios-of").textContent = DATA.ratiosOf;
$("ratio-table").append(table(DATA.ratios));
for (const [column, meaning] of Object.entries(DATA.explained)) $("explained").append(el("dt", "", column), el("dd", "", meaning));
$("plots").hidden = !$("plots").querySelector("img");
$("left-out").textContent = DATA.leftOut;
$("command").textContent = DATA.command;
$("method").addEventListener("change", () => choose($("method").value, view().n, view().seed));
$("n").addEventListener("change", () => choose(view().method, Number($("n").value), view().seed));
$("seed").addEventListener("change", () => choose(view().method, view().n, Number($("seed").value)));
$("filter").addEventListener("change", draw);
$("bar").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("select, input, .scroll")) return;
  const by = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key];
  if (by) step(by);
  else if (event.key === "w") {
    $("filter").value = $("filter").value === "wrong" ? "all" : "wrong";
    draw();
  } else return;
  event.preventDefault();
});
window.addEventListener("hashchange", fromHash);
if (!fromHash()) choose(DATA.views[0].method, Math.max(...DATA.views.filter((v) => v.method === DATA.views[0].method).map((v) => v.n)), DATA.views[0].seed);
