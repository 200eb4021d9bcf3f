// Chapter 1: what a layer costs. The formulas are those of docs/hooks/cost.py, whose values for
// some layers come with the page; the check of the built site compares the two.
for (const box of document.querySelectorAll('[data-widget="cost"]')) {
  const { constants, controls, start } = JSON.parse(box.querySelector("script").textContent);
  const { dim, number, id, tflops, tbps } = constants;

  const cost = (operations, bytes) => {
    const [products, moves] = [operations / tflops, bytes / tbps];
    const bound = products > moves ? "products" : "bytes";
    return { operations, bytes, seconds: Math.max(products, moves) / 1e12, bound };
  };

  function costs({ tokens: n, block, top_k, heads, groups }) {
    const kept = Math.min(n, top_k * block);
    const row = heads * 2 * dim * number, pair = groups * 2 * dim * number, ids = groups * top_k * id;
    return {
      prefill: {
        dense: cost(2 * heads * dim * n ** 2, n * (row + pair)),
        index: cost(groups * dim * n ** 2, n * ((groups + 1) * dim * number + ids)),
        main: cost(4 * heads * dim * kept * (n - kept / 2), n * (row + pair + ids)),
      },
      decode: {
        dense: cost(4 * heads * dim * n, n * pair + row),
        index: cost(2 * groups * dim * n, (n + groups) * dim * number + ids),
        main: cost(4 * heads * dim * kept, kept * pair + row + ids),
      },
    };
  }

  function short(x, units) {
    let unit = 0;
    while (Number(x.toPrecision(3)) >= 1000 && unit + 1 < units.length) [x, unit] = [x / 1000, unit + 1];
    return `${Number(x.toPrecision(3))} ${units[unit]}`.trim();
  }
  const duration = (x) => short(x * 1e9, ["ns", "µs", "ms", "s"]);

  function show(layer) {
    const put = (place, words) => { box.querySelector(`[data-cell="${place}"]`).textContent = words; };
    for (const [name, { dense, index, main }] of Object.entries(costs(layer))) {
      const floor = index.seconds + main.seconds, longest = Math.max(dense.seconds, floor);
      for (const [stage, c] of Object.entries({ dense, index, main })) {
        put(`${name}.${stage}.operations`, short(c.operations, ["", "K", "M", "G", "T", "P"]));
        put(`${name}.${stage}.bytes`, short(c.bytes, ["B", "KB", "MB", "GB", "TB"]));
        put(`${name}.${stage}.seconds`, `${duration(c.seconds)}, ${c.bound}`);
        box.querySelector(`[data-bar="${name}.${stage}"]`).style.width = `${(100 * c.seconds) / longest}%`;
      }
      const ratios = {
        operations: dense.operations / (index.operations + main.operations),
        bytes: dense.bytes / (index.bytes + main.bytes),
        floor: dense.seconds / floor,
      };
      put(`${name}.gain`, Object.entries(ratios).map(([what, x]) => `${what} ${x.toFixed(1)}×`).join(", "));
      put(`${name}.both`, duration(floor));
    }
  }

  const layer = { ...start };
  const sliders = document.createElement("div");
  sliders.className = "w-controls";
  for (const { name, label, values } of controls) {
    const row = document.createElement("label"), shown = document.createElement("output");
    const slider = Object.assign(document.createElement("input"), {
      type: "range", name, min: 0, max: values.length - 1, value: values.indexOf(layer[name]),
    });
    const read = () => {
      layer[name] = values[slider.value];
      shown.textContent = layer[name].toLocaleString("en");
      slider.setAttribute("aria-valuetext", shown.textContent);
    };
    read();
    slider.addEventListener("input", () => { read(); show(layer); });
    row.append(`${label} `, shown, slider);
    sliders.append(row);
  }
  box.prepend(sliders);
  box.costs = costs;
  show(layer);
}
