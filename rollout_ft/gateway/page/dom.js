// Elements from text. Owns the only ways by which anything gets into the document: text and attributes that are named here. What
// comes from agents, engines and models is never anything but text.

export const byId = (id) => document.getElementById(id);

export function el(tag, { text, cls, title, href, label } = {}, ...children) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (cls) made.className = cls;
  if (title) made.title = title;
  if (label) made.setAttribute("aria-label", label);
  if (href !== undefined && href.startsWith("#")) made.setAttribute("href", href);
  made.append(...children);
  return made;
}

// Text in which `this` is code.
export function prose(text) {
  return text.split("`").map((part, at) => (at % 2 ? el("code", { text: part }) : part));
}

export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function show(node, shown) {
  if (node.hidden === shown) node.hidden = !shown;
}

// A cell is text, or {text, cls, href, title, second}; one that has not changed is left alone, so that focus and selection stay.
function fill(td, cell) {
  const wanted = typeof cell === "object" ? cell : { text: cell };
  const told = JSON.stringify(wanted);
  if (td.dataset.told === told) return;
  td.dataset.told = told;
  const second = wanted.second ? [el("span", { cls: "second" }, ...prose(wanted.second))] : [];
  const kept = wanted.href ? td.querySelector("a") : null;
  if (kept) {
    say(kept, wanted.text);
    kept.setAttribute("href", wanted.href);
    kept.title = wanted.title || "";
    while (kept.nextSibling) kept.nextSibling.remove();
    td.append(...second);
  } else {
    const first = wanted.href ? el("a", wanted) : wanted.cls ? el("span", wanted) : document.createTextNode(wanted.text);
    td.replaceChildren(first, ...second);
  }
  td.title = wanted.title || "";
}

// A table whose rows are kept from one look to the next. `columns`: [name, class].
export class Table {
  constructor(home, caption, columns, empty) {
    this.columns = columns;
    this.rows = new Map();
    this.empty = empty;
    const head = el("tr", {}, ...columns.map(([name, cls]) => {
      const th = el("th", { text: name, cls });
      th.scope = "col";
      return th;
    }));
    this.body = el("tbody");
    this.table = el("table", {}, el("caption", { text: caption, cls: "unseen" }), el("thead", {}, head), this.body);
    this.nothing = el("p", { cls: "note", text: empty });
    home.replaceChildren(this.table, this.nothing);
  }

  // `items`: [key, cells, class of the row]. Of several with one key each has a row of its own.
  update(items, empty = this.empty) {
    show(this.table, items.length > 0);
    show(this.nothing, items.length === 0);
    say(this.nothing, empty);
    const seen = new Map();
    let before = null;
    for (const [name, cells, cls] of items) {
      let key = name;
      for (let again = 2; seen.has(key); again += 1) key = `${name} (${again})`;
      const row = this.rows.get(key) || this.made();
      seen.set(key, row);
      if (row.className !== (cls || "")) row.className = cls || "";
      cells.forEach((cell, at) => fill(row.cells[at], cell));
      const place = before ? before.nextSibling : this.body.firstChild;
      if (place !== row) this.body.insertBefore(row, place);
      before = row;
    }
    for (const [key, row] of this.rows) if (!seen.has(key)) row.remove();
    this.rows = seen;
  }

  made() {
    return el("tr", {}, ...this.columns.map(([name, cls]) => {
      const td = el("td", { cls });
      td.dataset.label = name;
      return td;
    }));
  }
}

export function tiles(list, facts) {
  while (list.children.length > facts.length) list.lastChild.remove();
  facts.forEach(([name, value, cls, title], at) => {
    const tile = list.children[at] || list.appendChild(el("div", {}, el("dt"), el("dd")));
    tile.className = cls || "";
    tile.title = title || "";
    say(tile.firstChild, name);
    say(tile.lastChild, value);
  });
}

// Shares of a whole side by side, and what they are. `parts`: [name, number, class].
export function bar(id, parts) {
  const whole = parts.reduce((sum, [, n]) => sum + n, 0);
  show(byId(id), whole > 0);
  byId(id).replaceChildren(...parts.filter(([, n]) => n > 0).map(([, n, cls]) => {
    const part = el("span", { cls });
    part.style.flexGrow = String(n);
    return part;
  }));
  byId(`${id}-legend`).replaceChildren(...(whole ? parts : []).map(([name, n, cls]) => {
    const share = (100 * n) / whole;
    return el("span", {}, el("i", { cls }), `${number(n)} ${name} (${share > 0 && share < 0.1 ? "under 0.1" : share.toFixed(1)} %)`);
  }));
}

export const number = (n) => Math.round(n).toLocaleString("en-US");
export const plural = (n, noun) => `${number(n)} ${noun}${n === 1 ? "" : "s"}`;

export function length(s) {
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 90) return `${Math.round(s)} s`;
  if (s < 5400) return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
  return `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`;
}

export const clock = (t) => new Date(t * 1000).toLocaleTimeString("en-GB");
export const moment = (t) => new Date(t * 1000).toISOString().replace("T", " ").replace(/\.\d+Z/, " UTC");
