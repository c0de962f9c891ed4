"use strict";
// Everything that comes from a caption is written with textContent: it is never parsed as markup.
(async () => {
  const PAGE = 48, ACTIONS = ["keep", "re-pair", "drop"];
  const $ = (id) => document.getElementById(id);
  const packed = Uint8Array.from(atob($("data").textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = JSON.parse(await new Response(stream).text());
  const detectors = Object.keys(data.scores);
  let rows = [], page = 0;

  const el = (tag, name, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const option = (select, value, text) => {
    const node = el("option", "", text); node.value = value; select.append(node);
  };
  detectors.forEach((name) => option($("by"), name, name));

  // Cells that carry little of the plan are darkened.
  const picture = (uri, heat, label) => {
    const frame = el("div", "frame");
    if (uri) { const img = el("img"); img.src = uri; img.alt = ""; frame.append(img); } else frame.append(el("span", "blank"));
    if (heat && $("plan").checked) {
      const side = Math.sqrt(heat.length), cover = el("div", "heat");
      cover.style.gridTemplateColumns = `repeat(${side}, 1fr)`;
      heat.forEach((h) => { const cell = el("i"); cell.style.opacity = String(0.82 * (1 - h)); cover.append(cell); });
      frame.append(cover);
    }
    if (label) frame.append(el("span", "label", label));
    return frame;
  };

  const tile = (i) => {
    const node = el("figure", `tile ${ACTIONS[data.action[i]]}`), [uri, own, best, attack] = data.picture[i] || [];
    const shots = el("div", "shots");
    shots.append(picture(uri, own, own && $("plan").checked ? "its caption" : ""));
    if (best && $("plan").checked) shots.append(picture(uri, best, "the nominee"));
    const words = el("figcaption"), action = ACTIONS[data.action[i]];
    const marks = el("p", "marks");
    marks.append(el("span", `mark ${action}`, action));
    if (attack) marks.append(el("span", "mark poison", `poison: ${attack}`));
    if (data.word[i]) marks.append(el("span", "copies", `doubtful word: ${data.word[i]}`));
    if (data.copies[i] > 1) marks.append(el("span", "copies", `${data.copies[i]} copies`));
    words.append(marks, el("p", action === "keep" ? "caption" : "caption gone", data.caption[i]));
    if (action === "re-pair") words.append(el("p", "caption new", `→ ${data.best[i]}`));
    else if (action === "drop") words.append(el("p", "caption held", `nominee, not taken: ${data.best[i]}`));
    const by = $("by").value;
    words.append(el("p", "fine", `${by} ${data.scores[by][i]} · ${data.key[i]}`));
    node.append(shots, words);
    return node;
  };

  const draw = () => {
    const pages = Math.max(1, Math.ceil(rows.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    $("tiles").replaceChildren(...rows.slice(page * PAGE, (page + 1) * PAGE).map(tile));
    $("where").textContent = `page ${page + 1} of ${pages}, ${rows.length.toLocaleString("en")} pairs`;
    $("back").disabled = page === 0; $("next").disabled = page === pages - 1;
    document.documentElement.dataset.ready = "yes";
  };

  const choose = () => {
    const score = data.scores[$("by").value], action = $("action").value, asked = $("find").value.toLowerCase();
    const seen = $("seen").checked;
    rows = [];
    for (let i = 0; i < data.key.length; i++) {
      if (action !== "" && data.action[i] !== Number(action)) continue;
      if (seen && !data.picture[i]) continue;
      if (asked && !data.caption[i].toLowerCase().includes(asked) && !data.key[i].toLowerCase().includes(asked)) continue;
      rows.push(i);
    }
    rows.sort((a, b) => score[b] - score[a] || a - b);
    page = 0;
    draw();
  };

  for (const id of ["by", "action", "seen", "plan"]) $(id).addEventListener("change", choose);
  $("find").addEventListener("input", choose);
  $("back").addEventListener("click", () => { page -= 1; draw(); });
  $("next").addEventListener("click", () => { page += 1; draw(); });
  choose();
})();
