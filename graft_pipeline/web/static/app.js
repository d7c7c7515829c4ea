// The search page: one form, one map, one list. Whatever comes from outside (titles, tags, names) reaches the page as
// text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
// ColorBrewer's RdPu: stands out against green, brown and blue ground.
const RAMP = ["#fcc5c0", "#fa9fb5", "#f768a1", "#dd3497", "#ae017e", "#7a0177", "#49006a"];
const EXAMPLES = ["farmland", "a lake", "a baseball field", "a residential area", "an industrial area", "a highway"];
const PAGE = 24, MOST = 500;

const state = {
  about: null, query: null, box: null, density: null, shownTop: PAGE, selected: null, before: null,
  // What can be aborted: a search, and the newest request for what the map draws.
  running: null, loading: null,
};

// --- small helpers ---

/** An element with properties and children; strings become text. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(1)}`;
const place = (lat, anyLon) => {
  const lon = L.Util.wrapNum(anyLon, [-180, 180], true);
  return `${Math.abs(lat).toFixed(4)}° ${lat < 0 ? "S" : "N"}, ${Math.abs(lon).toFixed(4)}° ${lon < 0 ? "W" : "E"}`;
};

/** The colour of a share of the ramp, 0 to 1. */
function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1), low = Math.min(Math.floor(at), RAMP.length - 2);
  const parts = [1, 3, 5].map((k) => {
    const [a, b] = [RAMP[low], RAMP[low + 1]].map((hex) => parseInt(hex.slice(k, k + 2), 16));
    return Math.round(a + (b - a) * (at - low));
  });
  return `rgb(${parts.join(" ")})`;
}
const SHADES = Array.from({ length: 65 }, (_, k) => colour(k / 64));
const shade = (share) => SHADES[Math.round(Math.min(Math.max(share, 0), 1) * 64)];

class Refused extends Error {}

/** JSON from our own server; its refusals come as Refused with its words. */
async function ask(path, signal) {
  let answer;
  try {
    answer = await fetch(path, { signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer: is `graft serve` still running?");
  }
  const content = await answer.json().catch(() => ({}));
  signal?.throwIfAborted();
  if (!answer.ok) throw new Refused(content.error || `The server answered with status ${answer.status}.`);
  return content;
}

function say(text, kind = "") {
  $("status").textContent = text;
  $("status").className = kind;
}

function fail(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof Refused)) console.error(error);
  say(error instanceof Refused ? error.message : "The page failed on this answer: reload it.", "trouble");
}

// --- the map ---

const map = L.map("map", { zoomControl: false, attributionControl: false, minZoom: 3, maxZoom: 19, zoomSnap: 0.25 });
L.control.zoom({ position: "topright" }).addTo(map);
L.control.scale({ position: "bottomleft" }).addTo(map);
const attribution = L.control.attribution({ prefix: "Leaflet" }).addTo(map);
const boxLayer = L.rectangle([[0, 0], [0, 0]], { color: "#14324a", weight: 2, fill: false, interactive: false });
const tileLayer = L.layerGroup().addTo(map);
const pointer = L.circleMarker([0, 0], { radius: 11, color: "#14324a", weight: 3, fill: false, interactive: false });
const tooltip = L.tooltip({ direction: "top", offset: [0, -6] });

const mercator = (lat) => 0.5 - Math.asinh(Math.tan((lat * Math.PI) / 180)) / (2 * Math.PI);

/** Draws what tiles score on one canvas, tens of thousands of them within a frame. */
const Density = L.Layer.extend({
  onAdd() {
    this._canvas = L.DomUtil.create("canvas", "leaflet-zoom-animated");
    this._canvas.id = "density";
    this.getPane().appendChild(this._canvas);
    map.on("move moveend resize", this.draw, this).on("zoomanim", this._follow, this);
    this.draw();
  },

  show(density) {
    this._data = density;
    if (density?.kind === "tiles") {
      this._x = density.lon.map((lon) => (lon + 180) / 360);
      this._y = density.lat.map(mercator);
      // The best are drawn last, on top.
      this._order = density.contrast.map((_, k) => k).sort((a, b) => density.contrast[a] - density.contrast[b]);
    }
    this.draw();
  },

  _follow(event) {
    const scale = map.getZoomScale(event.zoom);
    const corner = map._latLngBoundsToNewLayerBounds(map.getBounds(), event.zoom, event.center).min;
    L.DomUtil.setTransform(this._canvas, corner, scale);
  },

  draw() {
    if (!this._map || map._animatingZoom) return;
    const size = map.getSize(), ratio = window.devicePixelRatio || 1, canvas = this._canvas;
    L.DomUtil.setPosition(canvas, map.containerPointToLayerPoint([0, 0]));
    canvas.width = size.x * ratio;
    canvas.height = size.y * ratio;
    canvas.style.width = `${size.x}px`;
    canvas.style.height = `${size.y}px`;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    if (this._data) (this._data.kind === "tiles" ? this._drawTiles : this._drawCells).call(this, context, size);
  },

  _frame() {
    const world = 256 * 2 ** map.getZoom(), corner = map.getPixelBounds().min;
    return { world, corner };
  },

  /** Side of a tile's footprint on the screen. */
  side() {
    const latitude = map.getCenter().lat;
    const metres = (40075016.7 * Math.cos((latitude * Math.PI) / 180)) / (256 * 2 ** map.getZoom());
    return state.about.footprint_m / metres;
  },

  _drawTiles(context, size) {
    const { world, corner } = this._frame(), { contrast } = this._data, least = threshold(), top = highest();
    const side = this.side(), isSquare = side >= 13, radius = Math.max(4.2, side / 2);
    for (const k of this._order) {
      const x = this._x[k] * world - corner.x, y = this._y[k] * world - corner.y;
      if (x < -side || y < -side || x > size.x + side || y > size.y + side) continue;
      if (contrast[k] < least) {
        context.fillStyle = "rgb(255 255 255 / .8)";
        context.strokeStyle = "rgb(40 55 70 / .75)";
        context.lineWidth = 0.8;
        context.beginPath();
        if (isSquare) context.rect(x - side / 2, y - side / 2, side, side);
        else context.arc(x, y, 1.6, 0, 7);
        if (!isSquare) context.fill();
        context.stroke();
        continue;
      }
      const ink = shade(contrast[k] / top);
      context.beginPath();
      if (isSquare) {
        context.rect(x - side / 2, y - side / 2, side, side);
        context.globalAlpha = 0.16;
        context.fillStyle = ink;
        context.fill();
        context.globalAlpha = 1;
        context.lineWidth = 4.5;
        context.strokeStyle = "rgb(255 255 255 / .9)";
        context.stroke();
        context.lineWidth = 2.6;
        context.strokeStyle = ink;
        context.stroke();
      } else {
        context.arc(x, y, radius, 0, 7);
        context.fillStyle = ink;
        context.fill();
        context.lineWidth = 1.2;
        context.strokeStyle = "#fff";
        context.stroke();
      }
    }
  },

  _drawCells(context) {
    const { world, corner } = this._frame(), { box, tiles, hits } = this._data, level = thresholdLevel();
    const greatest = greatestShare();
    box.forEach(([west, south, east, north], k) => {
      const x = ((west + 180) / 360) * world - corner.x, width = ((east - west) / 360) * world;
      const y = mercator(north) * world - corner.y, height = mercator(south) * world - corner.y - y;
      const share = hits[k][level] / tiles[k];
      if (share > 0) {
        context.globalAlpha = 0.82;
        context.fillStyle = shade(share / greatest);
        context.fillRect(x, y, width, height);
        context.globalAlpha = 1;
      }
      context.lineWidth = 0.6;
      context.strokeStyle = "rgb(40 55 70 / .35)";
      context.strokeRect(x, y, width, height);
    });
  },

  /** Number of the tile or cell under a point of the screen; -1 without one. */
  find(point) {
    if (!this._data) return -1;
    const { world, corner } = this._frame();
    if (this._data.kind === "cells") {
      const { lat, lng } = map.containerPointToLatLng(point);
      return this._data.box.findIndex(([w, s, e, n]) => lng >= w && lng < e && lat >= s && lat < n);
    }
    const reach = Math.max(9, this.side() / 2);
    let nearest = reach, found = -1;
    for (let k = 0; k < this._x.length; k += 1) {
      const x = Math.abs(this._x[k] * world - corner.x - point.x), y = Math.abs(this._y[k] * world - corner.y - point.y);
      const far = Math.max(x, y);
      if (far < nearest || (far === nearest && found >= 0 && this._data.contrast[k] > this._data.contrast[found])) {
        nearest = far;
        found = k;
      }
    }
    return found;
  },
});
const density = new Density();

map.on("mousemove", (event) => {
  const k = state.drawing ? -1 : density.find(event.containerPoint);
  map.getContainer().style.cursor = k >= 0 ? "pointer" : "";
  if (k < 0) return tooltip.remove();
  const data = state.density;
  let where = event.latlng, text;
  if (data.kind === "tiles") {
    where = [data.lat[k], data.lon[k]];
    text = `${signed(data.contrast[k])} above the mean tile`;
  } else {
    text = `${data.hits[k][thresholdLevel()]} of ${count(data.tiles[k], "tile")}`;
  }
  tooltip.setLatLng(where).setContent(make("span", {}, text)).addTo(map);
});
map.on("mouseout", () => tooltip.remove());
map.on("click", (event) => {
  const k = state.drawing ? -1 : density.find(event.containerPoint);
  if (k < 0) return;
  const data = state.density;
  if (data.kind === "cells") {
    const [west, south, east, north] = data.box[k];
    map.fitBounds([[south, west], [north, east]]);
  } else {
    open(data.regions[data.region[k]], data.tile_id[k]);
  }
});

let waiting = null;
map.on("moveend", () => {
  // Only where the answer does not hold every tile does another view need another answer.
  if (!state.density || state.density.isWhole) return;
  clearTimeout(waiting);
  waiting = setTimeout(() => loadDensity().catch(fail), 250);
});

// --- threshold ---

const highest = () => state.density?.histogram.top ?? 3;
const threshold = () => Number($("contrast").value);

/** Place of the threshold among those that cells were counted at. */
function thresholdLevel() {
  const levels = state.density.thresholds;
  let level = 0;
  while (level + 1 < levels.length && levels[level + 1] <= threshold() + 1e-9) level += 1;
  return level;
}

function greatestShare() {
  const { hits, tiles } = state.density, level = thresholdLevel();
  // Cells of one or two tiles would set the scale for all others.
  const shares = hits.map((of, k) => (tiles[k] >= 3 ? of[level] / tiles[k] : 0));
  return Math.max(0.1, ...shares);
}

function countHits() {
  const data = state.density;
  if (data.kind === "tiles") return data.contrast.reduce((sum, value) => sum + (value >= threshold()), 0);
  const level = thresholdLevel();
  return data.hits.reduce((sum, of) => sum + of[level], 0);
}

function drawHistogram() {
  const canvas = $("histogram"), ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = 54;
  if (!width) return;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const { counts, top } = state.density.histogram, most = Math.max(1, ...counts), bar = width / counts.length;
  counts.forEach((number, k) => {
    if (!number) return;
    // Roots: what an analyst looks for is the short tail.
    const tall = Math.max(1.5, Math.sqrt(number / most) * (height - 4)), value = ((k + 0.5) / counts.length) * top;
    context.fillStyle = value >= threshold() ? shade(value / top) : "#cdd6dd";
    context.fillRect(k * bar + 0.5, height - tall, bar - 1, tall);
  });
}

function showThreshold() {
  const data = state.density, isCells = data.kind === "cells";
  if (isCells) $("contrast").value = data.thresholds[thresholdLevel()];
  const hits = countHits(), of = data.shown, where = of === data.admitted ? "" : " in view";
  $("hits").textContent = count(hits, "tile");
  $("hits-rest").textContent =
    `of ${of.toLocaleString("en")}${where} ${hits === 1 ? "lies" : "lie"} at least ${threshold().toFixed(2)} standard deviations above the mean.`;
  $("top").textContent = `+${highest().toFixed(1)}`;
  $("contrast").setAttribute("aria-valuetext", `${threshold().toFixed(2)} standard deviations, ${count(hits, "tile")}`);
  const parameters = queryParameters();
  parameters.set("contrast", threshold());
  $("save").href = `api/hits.geojson?${parameters}`;
  $("save").setAttribute("aria-disabled", String(hits === 0 && data.isWhole));
  $("legend-title").textContent = isCells
    ? `Share of hits, squares of ${data.side_km.toPrecision(2)} km`
    : "Standard deviations above the mean tile";
  $("legend-rest").hidden = isCells;
  $("legend-low").textContent = isCells ? "0 %" : "0";
  $("legend-high").textContent = isCells ? `${Math.round(100 * greatestShare())} %` : `+${highest().toFixed(1)}`;
  drawHistogram();
  density.draw();
  for (const card of $("list").children) {
    card.classList.toggle("below", card.contrast !== undefined && card.contrast < threshold());
  }
}

$("contrast").addEventListener("keydown", (event) => {
  const steps = { ArrowRight: 1, ArrowUp: 1, PageUp: 2, ArrowLeft: -1, ArrowDown: -1, PageDown: -2 }[event.key];
  if (!steps || state.density?.kind !== "cells") return;
  // Only some thresholds were counted: less than a whole step would be taken back.
  event.preventDefault();
  const levels = state.density.thresholds, level = thresholdLevel() + steps;
  $("contrast").value = levels[Math.min(Math.max(level, 0), levels.length - 1)];
  $("contrast").dispatchEvent(new Event("input"));
});
$("contrast").addEventListener("input", () => {
  if (!state.density) return;
  showThreshold();
  remember();
});
window.addEventListener("resize", () => state.density && drawHistogram());

// --- box ---

const boxText = (box) => box.map((value) => Number(value.toFixed(5))).join(",");

function setBox(box, isSearched = true) {
  state.box = box;
  $("box").hidden = box === null;
  if (box === null) {
    boxLayer.remove();
  } else {
    const [west, south, east, north] = box, corner = L.latLng(south, west);
    const km = (other) => (corner.distanceTo(other) / 1000).toPrecision(2);
    $("box-size").textContent = `Box ${km([south, east])} × ${km([north, west])} km`;
    boxLayer.setBounds([[south, west], [north, east]]).addTo(map);
  }
  if (isSearched) rerun();
}

function boxOf(bounds) {
  const clamp = (value, limit) => Math.min(Math.max(value, -limit), limit);
  const box = [
    clamp(bounds.getWest(), 180), clamp(bounds.getSouth(), 90), clamp(bounds.getEast(), 180), clamp(bounds.getNorth(), 90),
  ];
  return box[0] < box[2] && box[1] < box[3] ? box : null;
}

function setDrawing(isOn) {
  state.drawing = isOn;
  $("draw").setAttribute("aria-pressed", String(isOn));
  map.getContainer().classList.toggle("drawing", isOn);
  map.dragging[isOn ? "disable" : "enable"]();
  $("hint").hidden = !isOn;
  $("hint").textContent = "Drag from one corner of the box to the other";
}

$("draw").addEventListener("click", () => setDrawing(!state.drawing));
$("view").addEventListener("click", () => setBox(boxOf(map.getBounds())));
$("clear-box").addEventListener("click", () => {
  setBox(null);
  $("draw").focus();
});
{
  let start = null;
  const surface = map.getContainer();
  surface.addEventListener("pointerdown", (event) => {
    if (!state.drawing || event.button !== 0 || event.target.closest(".leaflet-control")) return;
    start = map.mouseEventToLatLng(event);
    surface.setPointerCapture(event.pointerId);
  });
  surface.addEventListener("pointermove", (event) => {
    if (start) boxLayer.setBounds(L.latLngBounds(start, map.mouseEventToLatLng(event))).addTo(map);
  });
  surface.addEventListener("pointerup", (event) => {
    if (!start) return;
    const from = map.latLngToContainerPoint(start), to = map.mouseEventToContainerPoint(event);
    const bounds = L.latLngBounds(start, map.mouseEventToLatLng(event));
    start = null;
    // A slip of the hand is no box.
    const isBox = Math.abs(from.x - to.x) > 5 && Math.abs(from.y - to.y) > 5;
    setBox(isBox ? boxOf(bounds) : state.box, isBox);
    // The click that ends the drag must not open a tile.
    setTimeout(() => setDrawing(false), 0);
  });
}

// --- searching ---

function queryParameters() {
  const parameters = new URLSearchParams({ words: state.query });
  if (state.box) parameters.set("box", boxText(state.box));
  for (const name of ["since", "until"]) if ($(name).value) parameters.set(name, $(name).value);
  return parameters;
}

/** Keep the query in the address, so that it can be bookmarked and sent. */
function remember() {
  if (!state.query) return;
  const parameters = queryParameters();
  parameters.set("contrast", threshold());
  history.replaceState(null, "", `#${parameters}`);
}

/** Ask what the map draws; only the newest answer is taken. */
async function loadDensity() {
  state.loading?.abort();
  const { signal } = (state.loading = new AbortController());
  const parameters = queryParameters(), old = state.density;
  // None where the map was moved beyond the globe.
  const view = old && !old.isWhole ? boxOf(map.getBounds().pad(0.3)) : null;
  if (view) parameters.set("view", boxText(view));
  const data = await ask(`api/density?${parameters}`, signal);
  data.isWhole = data.kind === "tiles" && data.shown === data.admitted;
  state.density = data;
  const slider = $("contrast");
  slider.max = data.histogram.top;
  if (state.wanted !== undefined) slider.value = state.wanted;
  delete state.wanted;
  density.show(data);
  $("legend").hidden = data.admitted === 0;
  $("threshold").hidden = data.admitted === 0 || !$("detail").hidden;
  if (data.admitted) showThreshold();
  return data;
}

/** Draw nothing, and ask for no other view of it. */
function clearDensity() {
  clearTimeout(waiting);
  state.loading?.abort();
  state.density = null;
  density.show(null);
  tooltip.remove();
}

async function run() {
  state.running?.abort();
  state.running = new AbortController();
  const { signal } = state.running;
  closeDetail(false);
  $("intro").hidden = $("more").hidden = true;
  clearDensity();
  state.shownTop = PAGE;
  say(`Searching for “${state.query}” …`, "busy");
  try {
    const [found, data] = await Promise.all([
      ask(`api/search?${queryParameters()}&top=${PAGE}`, signal), loadDensity(),
    ]);
    list(found.results);
    remember();
    document.title = `${state.query} – GRAFT search`;
    $("days").hidden = !data.days;
    if (data.days) $("days").textContent = `These tiles’ scenes are of ${[...new Set(data.days)].join(" to ")}.`;
    if (data.admitted) {
      say(`The best of ${count(data.admitted, "tile")} for “${state.query}”${state.box ? " in the box" : ""}.`);
    } else {
      const limits = [state.box && "box", ($("since").value || $("until").value) && "dates"].filter(Boolean).join(" and ");
      say(limits ? `No tile lies within the ${limits}: widen or clear the ${limits}.` : "No tile is indexed yet.");
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      $("list").replaceChildren();
      $("more").hidden = $("threshold").hidden = $("legend").hidden = true;
      clearDensity();
    }
    fail(error);
  }
}

function rerun() {
  if (state.query) run();
}

$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const words = $("words").value.trim().replace(/\s+/g, " ");
  if (!words) {
    say("Say in words what you are looking for, such as “farmland”.");
    return $("words").focus();
  }
  state.query = words;
  run();
});
for (const name of ["since", "until"]) $(name).addEventListener("change", rerun);

// --- results ---

function list(results) {
  $("list").replaceChildren(...results.map(card));
  $("more").hidden = results.length < state.shownTop || state.shownTop >= MOST;
  if (state.density?.admitted) showThreshold();
}

$("more").addEventListener("click", async () => {
  state.shownTop = Math.min(MOST, state.shownTop + PAGE * 2);
  try {
    const found = await ask(`api/search?${queryParameters()}&top=${state.shownTop}`, state.running.signal);
    const known = $("list").children.length;
    $("list").append(...found.results.slice(known).map((result, k) => card(result, known + k)));
    $("more").hidden = found.results.length < state.shownTop || state.shownTop >= MOST;
    showThreshold();
  } catch (error) {
    fail(error);
  }
});

const tilePath = (region, tileId) => `api/tile/${encodeURIComponent(region)}/${encodeURIComponent(tileId)}`;

/** Cards fetch their photos when they come into sight. */
const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    ask(tilePath(target.result.region, target.result.tile_id))
      .then((tile) => target.querySelector(".card-body").append(previews(tile)))
      .catch((error) => target.querySelector(".card-body").append(make("p", { className: "note" }, error.message)));
  }
}, { root: null, rootMargin: "200px" });

function card(result, number) {
  const { mean, deviation } = state.density.background;
  const contrast = deviation > 0 ? (result.score - mean) / deviation : 0;
  const button = make(
    "button",
    { type: "button", className: "chip-button", ariaLabel: `Tile ${number + 1}: open` },
    picture(`${tilePath(result.region, result.tile_id)}/crop.jpg`, "", "crop"),
    make("span", { className: "rank" }, String(number + 1)),
  );
  button.addEventListener("click", () => open(result.region, result.tile_id));
  const body = make(
    "div",
    { className: "card-body" },
    make("div", { className: "head" }, make("b", {}, `${signed(contrast)} σ`), make("span", {}, `${result.acquired_on} · ${result.region}`)),
  );
  const item = make("li", { className: "card" }, button, body);
  item.contrast = contrast;
  item.result = result;
  item.addEventListener("pointerenter", () => pointer.setLatLng([result.lat, result.lon]).addTo(map));
  item.addEventListener("pointerleave", () => pointer.remove());
  button.addEventListener("focus", () => pointer.setLatLng([result.lat, result.lon]).addTo(map));
  button.addEventListener("blur", () => pointer.remove());
  seen.observe(item);
  return item;
}

/** An image that says so when it cannot be had. */
function picture(src, alt, className = "") {
  const image = make("img", { className, src, alt, loading: "lazy" });
  image.addEventListener("error", () => image.replaceWith(make("span", { className: `${className} lost` }, "no image")));
  return image;
}

/** A tile's photos in short: copies where they may be shown, else links. */
function previews(tile) {
  const { photos } = tile;
  if (!photos.length) return make("p", { className: "note" }, "No photo is paired with this tile.");
  if (photos.some((photo) => photo.copy_url)) {
    const few = photos.slice(0, photos.length > 4 ? 3 : 4);
    const pictures = few.map((photo) => picture(photo.copy_url, photo.title || "Ground photo"));
    if (photos.length > few.length) pictures.push(make("span", { className: "rest" }, `+${photos.length - few.length}`));
    return make("div", { className: "photos" }, ...pictures);
  }
  const lines = photos.slice(0, 3).map((photo) => make("li", {}, pageLink(photo, photo.title || "Untitled photo")));
  if (photos.length > 3) lines.push(make("li", { className: "note" }, `and ${count(photos.length - 3, "more photo")}`));
  return make("ul", { className: "links" }, ...lines);
}

/** A link to a photo's own page; only such addresses become links. */
function pageLink(photo, text) {
  if (!photo.page_url?.startsWith("https://www.flickr.com/")) return make("span", {}, text);
  return make("a", { href: photo.page_url, target: "_blank", rel: "noopener noreferrer" }, text);
}

// --- one tile ---

async function open(region, tileId) {
  state.selected = tileId;
  try {
    const tile = await ask(tilePath(region, tileId));
    if (state.selected !== tileId) return;
    showDetail(tile);
  } catch (error) {
    fail(error);
  }
}

function contrastOf(tileId) {
  const { density: data } = state, k = data?.kind === "tiles" ? data.tile_id.indexOf(tileId) : -1;
  if (k >= 0) return data.contrast[k];
  return [...$("list").children].find((item) => item.result.tile_id === tileId)?.contrast;
}

function showDetail(tile) {
  if ($("detail").hidden) state.before = { center: map.getCenter(), zoom: map.getZoom(), scroll: $("panel").scrollTop };
  const back = make("button", { type: "button", id: "back" }, "← Back to the list");
  back.addEventListener("click", () => closeDetail());
  const { photos } = tile, px = tile.chip_px, edge = (px - tile.footprint_px) / 2;
  const marks = svg("svg", { viewBox: `0 0 ${px} ${px}`, "aria-hidden": "true" },
    svg("rect", { x: edge, y: edge, width: tile.footprint_px, height: tile.footprint_px }));
  const dots = photos.map((photo, k) => {
    const label = svg("text", { x: photo.col_px, y: photo.row_px + 0.5 });
    label.textContent = String(k + 1);
    return svg("g", { class: "dot" }, svg("circle", { cx: photo.col_px, cy: photo.row_px, r: 12 }), label);
  });
  // The nearest to the centre come first in the list and lie on top.
  marks.append(...[...dots].reverse());
  const contrast = contrastOf(tile.tile_id);
  const facts = [
    contrast === undefined ? null : `${signed(contrast)} standard deviations above the mean tile`,
    `scene of ${tile.acquired_on}`, `${tile.gsd_m} m a pixel`,
    tile.cloud_pct === null ? null : `${tile.cloud_pct.toFixed(1)} % cloud`,
  ];
  const middle = tile.footprint_ring.reduce((sum, [lat, lon]) => [sum[0] + lat / 4, sum[1] + lon / 4], [0, 0]);
  $("detail").replaceChildren(
    back,
    make("h2", {}, place(...middle)),
    make("p", { className: "facts" }, facts.filter(Boolean).join(" · ")),
    make("div", { className: "chipframe" },
      picture(`${tilePath(tile.region, tile.tile_id)}/chip.jpg`, "The tile from above"), marks),
    make("p", { className: "note" }, `The dashed square is what was compared with the words. Tile ${tile.tile_id}, scene ${tile.scene_id}.`),
    make("h2", {}, photos.length ? count(photos.length, "ground photo") : "No ground photo"),
    ...photos.map((photo, k) => photoEntry(photo, k, dots[k])),
  );
  $("results").hidden = $("threshold").hidden = true;
  $("search").hidden = $("status").hidden = true;
  $("detail").hidden = false;
  $("panel").scrollTop = 0;
  back.focus({ preventScroll: true });
  tileLayer.clearLayers();
  if (!state.about.basemap) {
    // In its own projection a chip is turned by a degree or so against the map: near enough to look at.
    L.imageOverlay(`${tilePath(tile.region, tile.tile_id)}/chip.jpg`, L.latLngBounds(tile.chip_ring)).addTo(tileLayer);
  }
  L.polygon(tile.footprint_ring, { color: "#14324a", weight: 3, fill: false, interactive: false }).addTo(tileLayer);
  photos.forEach((photo) => {
    const [south, , north] = tile.chip_ring, along = photo.col_px / px, down = photo.row_px / px;
    const spot = [north[0] + (south[0] - north[0]) * down, south[1] + (north[1] - south[1]) * along];
    L.circleMarker(spot, { radius: 4, color: "#fff", weight: 1.5, fillColor: "#ae017e", fillOpacity: 1, interactive: false }).addTo(tileLayer);
  });
  map.setView(middle, Math.max(map.getZoom(), 15));
}

function photoEntry(photo, number, dot) {
  const text = make("div", {},
    make("p", {}, make("span", { className: "number" }, String(number + 1)), make("b", {}, photo.title || "Untitled")),
    make("p", { className: "small" }, photo.taken_on ? `Taken on ${photo.taken_on}` : "Day unknown"),
    make("p", { className: "small" }, "Licence: ", photo.licence.url
      ? make("a", { href: photo.licence.url, target: "_blank", rel: "noopener noreferrer license" }, photo.licence.name)
      : photo.licence.name),
    photo.page_url ? make("p", { className: "small" }, pageLink(photo, "Open on Flickr ↗")) : null,
    photo.tags.length ? make("p", { className: "small" }, photo.tags.slice(0, 8).map((tag) => `#${tag}`).join(" ")) : null);
  const shown = photo.copy_url ? picture(photo.copy_url, photo.title || "Ground photo") : make("span", {});
  const entry = make("article", { className: "photo" }, shown, text);
  entry.addEventListener("pointerenter", () => dot.classList.add("pointed"));
  entry.addEventListener("pointerleave", () => dot.classList.remove("pointed"));
  return entry;
}

function closeDetail(isReturned = true) {
  state.selected = null;
  tileLayer.clearLayers();
  if ($("detail").hidden) return;
  $("detail").hidden = true;
  $("detail").replaceChildren();
  $("results").hidden = $("search").hidden = $("status").hidden = false;
  $("threshold").hidden = !state.density?.admitted;
  if (state.density?.admitted) drawHistogram();
  if (isReturned && state.before) {
    $("panel").scrollTop = state.before.scroll;
    map.setView(state.before.center, state.before.zoom);
  }
}

// --- keys ---

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input[type=search], input[type=date]");
  if (event.key === "/" && !isTyping) {
    event.preventDefault();
    closeDetail();
    $("words").select();
  } else if (event.key === "Escape") {
    if (state.drawing) setDrawing(false);
    else if (!$("detail").hidden) closeDetail();
  } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && event.target.matches(".chip-button")) {
    event.preventDefault();
    const item = event.target.closest("li");
    (event.key === "ArrowDown" ? item.nextElementSibling : item.previousElementSibling)?.querySelector("button").focus();
  }
});

// --- start ---

async function start() {
  const [about, regions] = await Promise.all([ask("api/about"), ask("api/regions")]);
  state.about = about;
  $("scope").textContent = `${count(about.tiles, "satellite tile")} of ${about.sensor} in ${count(regions.length, "region")}, found by words.`;
  if (about.stale) say(`${count(about.stale, "region")} changed since the index was made: materialise the search index.`);
  if (about.basemap) {
    const [least, greatest] = about.basemap.zooms;
    L.tileLayer(about.basemap.url, {
      minZoom: least, maxNativeZoom: greatest, maxZoom: 19, updateWhenZooming: false, keepBuffer: 1,
    }).on("tileloadstart", ({ tile }) => {
      // Between zoom levels tiles are scaled, and light shines through their seams: let them overlap.
      tile.style.width = tile.style.height = "257px";
    }).addTo(map);
    if (about.basemap.attribution) {
      // Leaflet takes markup here.
      attribution.addAttribution(make("span", {}, about.basemap.attribution).innerHTML);
    }
  }
  showRegions(regions);
  // A region without a tile lies nowhere.
  const around = regions.filter(({ tiles }) => tiles)
    .map(({ tile_bounds: [west, south, east, north] }) => L.latLngBounds([south, west], [north, east]));
  if (around.length) map.fitBounds(around.reduce((all, one) => all.extend(one)), { padding: [24, 24] });
  else map.setView([20, 0], 3);
  density.addTo(map);
  const ramp = $("ramp").getContext("2d");
  for (let x = 0; x < 120; x += 1) {
    ramp.fillStyle = colour(x / 119);
    ramp.fillRect(x, 0, 1, 10);
  }
  for (const words of EXAMPLES) {
    const button = make("button", { type: "button" }, words);
    button.addEventListener("click", () => {
      $("words").value = words;
      $("search").requestSubmit();
    });
    $("examples").append(button);
  }
  if (!about.tiles) say("No tile is indexed yet: materialise chip_embeddings and search_index of a region.");
  restore();
}

/** Borders of the regions, and a veil over ground of which nothing is known. */
function showRegions(regions) {
  const rings = regions.map(({ bounds: [w, s, e, n] }) => [[s, w], [s, e], [n, e], [n, w]]);
  const globe = [[-89, -720], [-89, 720], [89, 720], [89, -720]];
  const veil = { stroke: false, fillColor: "#fff", fillOpacity: 0.6, fillRule: "evenodd", interactive: false };
  L.polygon([globe, ...rings], veil).addTo(map);
  const border = { color: "#14324a", weight: 1, opacity: 0.7, dashArray: "5 5", fill: false, interactive: false };
  for (const ring of rings) L.polygon(ring, border).addTo(map);
}

/** Take up the query that the address holds. */
function restore() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const words = parameters.get("words");
  if (!words) return;
  for (const name of ["since", "until"]) $(name).value = parameters.get(name) || "";
  const box = (parameters.get("box") || "").split(",").map(Number);
  setBox(box.length === 4 && box.every(Number.isFinite) ? box : null, false);
  if (parameters.has("contrast")) state.wanted = Number(parameters.get("contrast"));
  $("words").value = state.query = words;
  run();
}

window.addEventListener("hashchange", restore);
start().catch(fail);
