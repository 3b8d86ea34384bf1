"use strict";
// Everything is text until it is shown: nothing of the data ever becomes markup.
const ROW = 44, STEP = 8, $ = (id) => document.getElementById(id);
let data, found = [], shown = { query: 0, sign: "both", source: "", words: "", find: "" };

const element = (name, attributes = {}, ...children) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
};

async function unpack() {
  const raw = atob($("data").textContent), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i); // Uint8Array.from of a text is slow
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const wordsOf = (text) => new Set((text || "").toLowerCase().match(/[\p{L}\p{N}]{3,}/gu) || []);

// The text with the words that it shares with the query marked
function marked(text, shared) {
  const box = element("div", { class: "text", dir: "auto", tabindex: "0" });
  if (!text.trim()) { box.append(element("span", { class: "soft" }, "(empty)")); return box; }
  let end = 0;
  for (const match of text.matchAll(/[\p{L}\p{N}]{3,}/gu)) {
    if (!shared.has(match[0].toLowerCase())) continue;
    box.append(text.slice(end, match.index), element("mark", {}, match[0]));
    end = match.index + match[0].length;
  }
  box.append(text.slice(end));
  return box;
}

function picture(images, i, size) {
  const { height, width, channels } = images.shape, [h, w] = [height, width];
  const canvas = element("canvas", { width: w, height: h, role: "img", "aria-label": "picture" });
  canvas.style.width = `${size}px`;
  const raw = atob(images.pixels[i]), pixels = new ImageData(w, h);
  for (let p = 0; p < w * h; p++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * p + c] = raw.charCodeAt(channels === 3 ? 3 * p + c : p);
    pixels.data[4 * p + 3] = 255;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

const label = (items, i) => (items.texts && items.texts[i].trim() ? items.texts[i] : items.ids[i]);

// -- queries: only those in view are in the page
function search() {
  shown.find = $("search").value;
  const asked = shown.find.trim().toLowerCase();
  found = data.queries.ids.map((_, i) => i).filter((i) => !asked
    || data.queries.ids[i].toLowerCase() === asked || label(data.queries, i).toLowerCase().includes(asked));
  $("count").textContent = `${found.length.toLocaleString()} of ${data.queries.ids.length.toLocaleString()} queries`;
  $("rows").style.height = `${found.length * ROW}px`;
  $("queries").scrollTop = 0;
  rows();
}

function rows() {
  const box = $("queries"), first = Math.max(0, Math.floor(box.scrollTop / ROW) - 5);
  const some = found.slice(first, first + Math.ceil(box.clientHeight / ROW) + 10);
  $("rows").replaceChildren(...some.map((i, k) => {
    const row = element("div", { class: "row", role: "option", id: `query-${i}`, "aria-selected": i === shown.query,
      "aria-posinset": first + k + 1, "aria-setsize": found.length });
    row.style.top = `${(first + k) * ROW}px`;
    if (data.queries.images) row.append(picture(data.queries.images, i, 32));
    row.append(element("span", { dir: "auto" }, label(data.queries, i)));
    row.addEventListener("click", () => choose(i));
    return row;
  }));
  box.setAttribute("aria-activedescendant", `query-${shown.query}`);
}

function choose(i) {
  shown.query = i;
  const place = found.indexOf(i), box = $("queries");
  if (place >= 0) {
    if (place * ROW < box.scrollTop) box.scrollTop = place * ROW;
    if ((place + 1) * ROW > box.scrollTop + box.clientHeight) box.scrollTop = (place + 1) * ROW - box.clientHeight;
  }
  rows();
  show();
}

function move(step) {
  if (!found.length) return;
  const place = found.indexOf(shown.query);
  choose(found[Math.min(found.length - 1, Math.max(0, (place < 0 ? 0 : place) + step))]);
}

// -- what the methods say of the query
function card(method, k, shared, largest) {
  const i = method.examples[shown.query][k], score = method.scores[shown.query][k], place = data.train;
  const item = element("li", { class: score > 0 ? "for" : "against" });
  const head = element("div", { class: "head" }, element("span", { class: "score" }, score.toPrecision(4)));
  head.append(element("span", {}, place.ids[i]));
  if (place.sources) head.append(element("span", {}, place.sources[i]));
  const bar = element("div", { class: "bar" });
  bar.style.width = `${(100 * Math.abs(score)) / largest}%`;
  const body = element("div", { class: "body" });
  if (place.images) body.append(picture(place.images, i, 72));
  if (place.texts) body.append(marked(place.texts[i], shared));
  item.append(head, bar, body);
  return item;
}

function list(method, sign, shared, largest) {
  const scores = method.scores[shown.query], examples = method.examples[shown.query];
  let kept = scores.map((_, k) => k).filter((k) => (sign === "proponents" ? scores[k] > 0 : scores[k] < 0));
  if (sign === "opponents") kept.reverse(); // the strongest first
  if (shown.source) kept = kept.filter((k) => data.train.sources[examples[k]] === shown.source);
  const asked = shown.words.toLowerCase();
  if (asked) kept = kept.filter((k) => label(data.train, examples[k]).toLowerCase().includes(asked));
  const box = element("ol", { "aria-label": `${sign} by ${method.name}` });
  const more = element("button", { type: "button" });
  const add = () => {
    const done = box.children.length;
    box.append(...kept.slice(done, done + STEP).map((k) => card(method, k, shared, largest)));
    const left = kept.length - box.children.length;
    more.textContent = `${Math.min(STEP, left)} more ${sign} of ${left}`;
    more.hidden = !left;
  };
  more.addEventListener("click", add);
  add();
  const none = kept.length ? [] : [element("p", { class: "soft" }, `no ${sign} among the ${scores.length} strongest`)];
  return [element("h3", {}, sign[0].toUpperCase() + sign.slice(1)), ...none, box, more];
}

function show() {
  const i = shown.query, { queries } = data, shared = wordsOf(queries.texts ? queries.texts[i] : "");
  const body = element("div", { class: "body" });
  if (queries.images) body.append(picture(queries.images, i, 112));
  if (queries.texts) body.append(marked(queries.texts[i], new Set()));
  $("query").replaceChildren(element("h2", {}, queries.ids[i]), body);
  $("methods").replaceChildren(...data.methods.map((method) => {
    const box = element("section", { class: "method", "aria-label": method.name }, element("h2", {}, method.name));
    box.append(element("p", { class: "soft" }, method.about));
    const largest = Math.max(...method.scores[i].map(Math.abs), 1e-30);
    for (const sign of ["proponents", "opponents"])
      if (shown.sign !== (sign === "proponents" ? "opponents" : "proponents")) box.append(...list(method, sign, shared, largest));
    return box;
  }));
  const view = new URLSearchParams({ q: queries.ids[i] });
  for (const name of ["sign", "source", "words", "find"])
    if (shown[name] && shown[name] !== "both") view.set(name, shown[name]);
  $("link").href = `#${view}`;
  history.replaceState(null, "", `#${view}`);
}

function reopen() {
  const view = new URLSearchParams(location.hash.slice(1)), place = data.queries.ids.indexOf(view.get("q"));
  const sources = data.train.sources ? [...new Set(data.train.sources)] : [];
  shown = { query: Math.max(0, place), words: view.get("words") || "", find: view.get("find") || "",
    sign: ["proponents", "opponents"].includes(view.get("sign")) ? view.get("sign") : "both",
    source: sources.includes(view.get("source")) ? view.get("source") : "" };
  for (const name of ["sign", "source", "words"]) $(name).value = shown[name];
  $("search").value = shown.find;
  search();
  choose(shown.query);
}

document.addEventListener("keydown", (event) => {
  const typing = ["INPUT", "SELECT"].includes(document.activeElement.tagName);
  if (event.key === "/" && !typing) { $("search").focus(); event.preventDefault(); }
  else if (event.key === "Escape" && typing) document.activeElement.blur();
  else if (!data || event.ctrlKey || event.metaKey || event.altKey) return;
  else if ((event.key === "j" && !typing) || (event.key === "ArrowDown" && document.activeElement === $("queries"))) { move(1); event.preventDefault(); }
  else if ((event.key === "k" && !typing) || (event.key === "ArrowUp" && document.activeElement === $("queries"))) { move(-1); event.preventDefault(); }
});

unpack().then((value) => {
  data = value;
  if (data.train.sources) {
    $("sources").hidden = false;
    $("source").append(...[...new Set(data.train.sources)].sort().map((name) => element("option", { value: name }, name)));
  }
  for (const name of ["sign", "source", "words"])
    $(name).addEventListener("input", () => { shown[name] = $(name).value; show(); });
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("search").addEventListener("input", () => { search(); show(); });
  $("queries").addEventListener("scroll", rows);
  window.addEventListener("hashchange", reopen);
  window.addEventListener("resize", rows);
  reopen();
  document.body.dataset.ready = "yes";
  requestAnimationFrame(() => setTimeout(() => performance.mark("shown"))); // once the first view is drawn
}).catch((error) => { $("about").textContent = `This page could not be opened: ${error}`; throw error; });
