"use strict";
// The page can do without this: it sorts and filters what is there, and loads nothing.
(() => {
  const PAGE = 50;
  const make = (tag, props = {}) => Object.assign(document.createElement(tag), props);
  const plural = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
  const later = (action) => {
    let timer;
    return () => { clearTimeout(timer); timer = setTimeout(action, 120); };
  };

  // Tables ------------------------------------------------------------------------------------

  // A number sorts by its value; "n/a" and empty cells stay last, whichever way.
  const keyOf = (row, column) => {
    const text = (row.cells[column]?.firstChild?.textContent ?? "").trim();
    const number = Number.parseFloat(text.replaceAll(",", "").replace("−", "-").replace("×", ""));
    if (text === "" || text === "n/a" || text === "—") return null;
    return Number.isNaN(number) ? text.toLowerCase() : number;
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b
      : String(a).localeCompare(String(b), "en", { numeric: true });

  const sortable = (table) => {
    const home = [...table.tBodies].map((body) => [body, [...body.rows]]);
    const rows = home.flatMap(([, own]) => own.filter((row) => !row.classList.contains("group")));
    const heads = [...table.querySelectorAll("th[data-col]")];
    const order = (head, state) => {
      for (const one of heads) one.removeAttribute("aria-sort");
      table.classList.toggle("flat", state !== "");
      if (state === "") {
        for (const [body, own] of home) body.append(...own);
        return;
      }
      head.setAttribute("aria-sort", state);
      const column = Number(head.dataset.col);
      const keys = new Map(rows.map((row) => [row, keyOf(row, column)]));
      const sign = state === "ascending" ? 1 : -1;
      const sorted = [...rows].sort((a, b) => {
        const [x, y] = [keys.get(a), keys.get(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * compare(x, y);
      });
      home[0][0].append(...sorted);
    };
    for (const head of heads) {
      const button = make("button", { type: "button", className: "sort" });
      button.append(...head.childNodes);
      head.append(button);
      // Numbers are looked at from the largest down, names from A.
      const cycle = head.classList.contains("num")
        ? ["descending", "ascending", ""] : ["ascending", "descending", ""];
      button.addEventListener("click", () => {
        const now = cycle.indexOf(head.getAttribute("aria-sort") ?? "");
        order(head, cycle[(now + 1) % 3]);
      });
    }
    if (rows.length < 6) return;
    const name = table.closest("[aria-label]")?.getAttribute("aria-label") ?? "table";
    const box = make("div", { className: "filters" });
    const label = make("label", { textContent: "filter rows " });
    const input = make("input", { type: "search", autocomplete: "off", spellcheck: false });
    input.setAttribute("aria-label", `Filter rows: ${name}`);
    const count = make("p");
    count.setAttribute("role", "status");
    label.append(input);
    box.append(label, count);
    table.parentElement.before(box);
    input.addEventListener("input", later(() => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let left = 0;
      for (const row of rows) {
        const text = `${row.cells[0].dataset.group ?? ""} ${row.textContent}`.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        left += row.hidden ? 0 : 1;
      }
      count.textContent = words.length ? `${left} of ${plural(rows.length, "row")}` : "";
    }));
  };
  for (const table of document.querySelectorAll("table[data-sort]")) sortable(table);

  // Findings ----------------------------------------------------------------------------------

  const filters = document.getElementById("finding-filters");
  if (!filters) return;
  const findings = [...document.querySelectorAll(".finding")];
  const further = document.getElementById("further");
  const more = document.getElementById("show-more");
  const [cell, cause, text] = ["cell", "cause", "text"].map((name) =>
    document.getElementById(`filter-${name}`));
  for (const [select, key] of [[cell, "cell"], [cause, "cause"]]) {
    for (const value of new Set(findings.map((one) => one.dataset[key]))) {
      select.append(make("option", { value, textContent: value }));
    }
  }
  const texts = new Map();
  const textOf = (finding) => {
    if (!texts.has(finding)) texts.set(finding, finding.textContent.toLowerCase());
    return texts.get(finding);
  };
  let room = PAGE;
  const apply = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const active = words.length > 0 || cell.value !== "" || cause.value !== "";
    let all = 0;
    let folded = 0;
    for (const one of findings) {
      const fits = (cell.value === "" || one.dataset.cell === cell.value)
        && (cause.value === "" || one.dataset.cause === cause.value)
        && words.every((word) => textOf(one).includes(word));
      const brief = one.classList.contains("brief");
      all += fits ? 1 : 0;
      folded += fits && brief ? 1 : 0;
      one.hidden = !fits || (brief && folded > room);
    }
    document.getElementById("filter-count").textContent =
      active ? `${all.toLocaleString("en")} of ${plural(findings.length, "finding")}` : "";
    if (!further) return;
    further.firstElementChild.textContent = active
      ? `${plural(folded, "further finding")} that fit` : plural(folded, "further finding");
    if (active && folded > 0) further.open = true;
    more.parentElement.hidden = folded <= room;
    more.textContent = `Show ${Math.min(PAGE, folded - room)} more of ${folded - room}`;
  };
  const restart = () => { room = PAGE; apply(); };
  for (const select of [cell, cause]) select.addEventListener("change", restart);
  text.addEventListener("input", later(restart));
  more?.addEventListener("click", () => {
    const next = findings.filter((one) => one.classList.contains("brief") && one.hidden);
    room += PAGE;
    apply();
    next.find((one) => !one.hidden)?.firstElementChild.focus();
  });
  // A link to a finding that is folded or not yet shown opens it.
  const reveal = () => {
    const one = document.getElementById(location.hash.slice(1));
    if (!one?.classList.contains("brief")) return;
    room = Math.max(room, findings.indexOf(one) + 1);
    apply();
    further.open = one.open = true;
    one.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  filters.hidden = false;
  apply();
  reveal();
})();
