"use strict";
(() => {
  const root = document.documentElement;
  const content = JSON.parse(document.getElementById("charts").textContent);
  const status = document.getElementById("status");
  const say = (words) => { status.textContent = words; };
  const options = { config: content.config, ast: true, actions: false, renderer: "svg", defaultStyle: false };

  const drawn = new Map();
  function draw(plot) {
    const id = plot.dataset.chart;
    if (drawn.has(id)) return drawn.get(id);
    const spec = { ...content.charts[id] };
    if (!spec.width || spec.width > 300) {
      spec.width = "container";
      spec.autosize = { type: "fit-x", contains: "padding" };
    }
    delete spec.title;
    const done = vegaEmbed(plot, spec, options).then(
      () => { plot.dataset.drawn = "yes"; },
      (error) => { plot.textContent = "This chart could not be drawn."; console.error(error); },
    );
    drawn.set(id, done);
    return done;
  }
  const drawVisible = (within) =>
    Promise.all([...within.querySelectorAll(".plot")].filter((plot) => !plot.closest("[hidden]")).map(draw));

  // A menu shows one of the parts of the page that its options name.
  for (const part of document.querySelectorAll("[data-later]")) part.hidden = true;
  for (const menu of document.querySelectorAll("select[data-shows]")) {
    const show = () => {
      for (const option of menu.options) document.getElementById(option.value).hidden = !option.selected;
      return drawVisible(document.getElementById(menu.value));
    };
    menu.addEventListener("change", () => show().then(() => say(`Showing ${menu.selectedOptions[0].text}.`)));
  }

  const compare = (a, b) => {
    const [x, y] = [a.key, b.key];
    if (x === "" || y === "") return x === y ? 0 : x === "" ? 1 : -1;
    const [m, n] = [Number(x), Number(y)];
    return Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y, "en", { numeric: true }) : m - n;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.firstChild.addEventListener("click", () => {
        // A number is most often looked up for its largest values.
        const first = head.classList.contains("number") ? "descending" : "ascending";
        const other = first === "ascending" ? "descending" : "ascending";
        const order = head.getAttribute("aria-sort") === first ? other : first;
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        const rows = [...table.tBodies[0].rows].map((row) => ({ row, key: row.cells[column].dataset.value }));
        const sign = order === "ascending" ? 1 : -1;
        rows.sort((a, b) => (a.key === "" || b.key === "" ? compare(a, b) : sign * compare(a, b)));
        table.tBodies[0].append(...rows.map((r) => r.row));
        say(`Sorted by ${head.textContent}, ${order}.`);
      });
    });
  }
  for (const field of document.querySelectorAll("input[data-filters]")) {
    field.addEventListener("input", () => {
      const rows = [...document.getElementById(field.dataset.filters).tBodies[0].rows];
      const words = field.value.toLowerCase().split(/\s+/);
      for (const row of rows) {
        const name = row.cells[0].textContent.toLowerCase();
        row.hidden = !words.every((word) => name.includes(word));
      }
      say(`${rows.filter((row) => !row.hidden).length} of ${rows.length} rows shown.`);
    });
  }

  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const tell = () => button.setAttribute("aria-pressed", String(isDark()));
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; tell(); });
  system.addEventListener("change", tell);
  tell();

  drawVisible(document).then(() => {
    root.dataset.ready = "yes";
    performance.mark("drawn");
  });
})();
