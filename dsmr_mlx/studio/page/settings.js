// Steering: each setting has the model's default until it is set, and can be reset.
import { byId, pitchName, setText, toThousandths } from "/shared/music.js";
import { make } from "./dialogs.js";

const WAIT = 250; // milliseconds after the last change of a slider
const TONICS = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"];
const one = (value) => value.toFixed(1),
  two = (value) => value.toFixed(2),
  seconds = (value) => `${value} s`;
const bias = (less, more) => (value) =>
  value === 0 ? "neutral" : `${value < 0 ? less : more}, ${one(Math.abs(value))}`;

// low, high, step: of the slider. usual: its position if the model has no default. less, more: words at its ends.
const SLIDERS = [
  {
    name: "temperature",
    label: "Temperature",
    low: 0.1,
    high: 2,
    step: 0.05,
    usual: 1,
    less: "calm",
    more: "wild",
    show: two,
  },
  {
    name: "density",
    label: "Density",
    low: 0.5,
    high: 24,
    step: 0.5,
    usual: 8,
    less: "sparse",
    more: "dense",
    show: (v) => `${one(v)} notes/s`,
  },
  {
    name: "dynamics",
    label: "Dynamics",
    low: -6,
    high: 6,
    step: 0.5,
    usual: 0,
    less: "soft",
    more: "loud",
    show: bias("softer", "louder"),
  },
  {
    name: "tempo",
    label: "Tempo",
    low: -2,
    high: 2,
    step: 0.1,
    usual: 0,
    less: "slow",
    more: "fast",
    sign: -1,
    show: bias("slower", "faster"),
  },
];
const MORE = [
  {
    name: "tonality",
    label: "Keeps to its key",
    low: 0,
    high: 1,
    step: 0.05,
    usual: 0,
    less: "free",
    more: "strict",
    show: two,
  },
  {
    name: "pitch_temperature",
    label: "Temperature of keys",
    low: 0.3,
    high: 1.5,
    step: 0.05,
    usual: 1,
    less: "calm",
    more: "wild",
    show: two,
  },
  {
    name: "max_polyphony",
    label: "Keys at once",
    low: 1,
    high: 20,
    step: 1,
    usual: 10,
    less: "one",
    more: "many",
    show: String,
  },
  {
    name: "max_note_seconds",
    label: "Longest note",
    low: 0.5,
    high: 20,
    step: 0.5,
    usual: 5,
    less: "short",
    more: "long",
    show: seconds,
  },
  {
    name: "max_silence_seconds",
    label: "Longest silence",
    low: 0.2,
    high: 10,
    step: 0.2,
    usual: 2,
    less: "short",
    more: "long",
    show: seconds,
  },
  {
    name: "end_within",
    label: "Ends within",
    low: 1,
    high: 30,
    step: 1,
    usual: 10,
    less: "soon",
    more: "late",
    show: seconds,
  },
  { name: "top_p", label: "Top p", low: 0.05, high: 1, step: 0.05, usual: 1, less: "few", more: "all", show: two },
  { name: "min_p", label: "Min p", low: 0, high: 0.5, step: 0.01, usual: 0, less: "all", more: "few", show: two },
  {
    name: "best_of",
    label: "Best of",
    low: 0,
    high: 16,
    step: 1,
    usual: 0,
    less: "first",
    more: "ranked",
    show: (v) => (v ? `${v} candidates` : "off"),
  },
];
const RANGES = [
  { name: "pitch_range", label: "Range of keys", low: 21, high: 108, show: pitchName },
  { name: "velocity_range", label: "Range of velocities", low: 1, high: 127, show: String },
];

export class Settings {
  // set(settings); midi(ports); webMidi(): a promise of a line of text
  constructor({ set, midi, webMidi }) {
    Object.assign(this, { set, midi, webMidi, fields: [], waiting: {}, timer: 0, touched: new Set() });
    const more = make("details", {}, make("summary", {}, "More"));
    byId("fields").append(
      this.modelField(),
      ...SLIDERS.map((s) => this.slider(s)),
      this.range(RANGES[0]),
      this.keyField(),
      this.seedField(),
      more,
    );
    more.append(...MORE.map((s) => this.slider(s)), this.range(RANGES[1]));
    byId("fields").append(this.midiFields());
  }

  // Sliders send at most a few messages a second; the last value always arrives.
  change(name, value) {
    this.waiting[name] = value;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.set(this.waiting);
      this.waiting = {};
    }, WAIT);
  }

  row(id, label, control, value, name) {
    const row = make("div", { class: "field" }, make("label", { for: id }, label), value, control);
    const reset = make(
      "button",
      {
        type: "button",
        class: "plain reset",
        "aria-label": `${label}: reset to the model's default`,
        title: "Reset to the model’s default",
      },
      "×",
    );
    reset.addEventListener("click", () => {
      this.change(name, null);
      reset.hidden = true;
      (control.querySelector("input, select") || control).focus();
    });
    row.append(reset);
    return { row, reset };
  }

  slider({ name, label, low, high, step, usual, less, more, sign = 1, show }) {
    const input = make("input", { type: "range", id: `set-${name}`, min: low, max: high, step });
    const value = make("output", { for: `set-${name}` });
    const [left, right] = [less, more].map((word) => make("span", { "aria-hidden": "true" }, word));
    const { row, reset } = this.row(input.id, label, make("div", { class: "scale" }, left, input, right), value, name);
    input.addEventListener("input", () => {
      const chosen = toThousandths(input.valueAsNumber * sign);
      setText(value, show(input.valueAsNumber));
      input.setAttribute("aria-valuetext", show(input.valueAsNumber));
      row.classList.add("set");
      reset.hidden = false;
      this.change(name, chosen);
    });
    this.fields.push((settings, recommended) => {
      if (name in this.waiting) return;
      const set = settings[name] ?? null,
        shown = (set ?? recommended[name] ?? usual * sign) * sign;
      input.value = shown;
      reset.hidden = set === null;
      row.classList.toggle("set", set !== null);
      setText(value, set === null ? "auto" : show(shown));
      input.setAttribute("aria-valuetext", set === null ? "automatic" : show(shown));
    });
    return row;
  }

  range({ name, label, low, high, show }) {
    const inputs = [0, 1].map((i) =>
      make("input", {
        type: "range",
        id: `set-${name}-${i}`,
        min: low,
        max: high,
        step: 1,
        "aria-label": `${label}: ${i ? "highest" : "lowest"}`,
      }),
    );
    const value = make("output", {}),
      { row, reset } = this.row(inputs[0].id, label, make("div", { class: "pair" }, ...inputs), value, name);
    const showValue = (pair) => setText(value, `${show(pair[0])}–${show(pair[1])}`);
    inputs.forEach((input, i) =>
      input.addEventListener("input", () => {
        const pair = inputs.map((each) => each.valueAsNumber);
        if (pair[0] > pair[1]) inputs[1 - i].value = pair[1 - i] = pair[i];
        showValue(pair);
        row.classList.add("set");
        reset.hidden = false;
        inputs.forEach((each, k) => each.setAttribute("aria-valuetext", show(pair[k])));
        this.change(name, pair);
      }),
    );
    this.fields.push((settings) => {
      if (name in this.waiting) return;
      const set = settings[name] ?? null,
        pair = set || [low, high];
      inputs.forEach((input, i) => {
        input.value = pair[i];
        input.setAttribute("aria-valuetext", show(pair[i]));
      });
      reset.hidden = set === null;
      row.classList.toggle("set", set !== null);
      if (set === null) setText(value, "auto");
      else showValue(pair);
    });
    return row;
  }

  modelField() {
    const select = make("select", { id: "set-model" }),
      note = make("p", { class: "remark" });
    select.addEventListener("change", () => this.set({ model: select.value }));
    let offered = "";
    this.fields.push((settings, recommended, models) => {
      const names = JSON.stringify(models.map((model) => [model.name, model.title]));
      if (names !== offered)
        select.replaceChildren(
          ...models.map((model) => make("option", { value: model.name }, model.title || model.name)),
        );
      offered = names;
      select.value = settings.model ?? models[0]?.name ?? "";
      const model = models.find(({ name }) => name === select.value),
        limits = [];
      if (model?.gaps === false) limits.push("Not trained with gaps");
      if (model?.live === false) limits.push("No duets");
      setText(note, [...limits, model?.licence].filter(Boolean).join(" · "));
      note.title = note.textContent;
    });
    return make("div", { class: "field wide" }, make("label", { for: "set-model" }, "Model"), select, note);
  }

  keyField() {
    const select = make("select", { id: "set-key" }, make("option", { value: "" }, "any"));
    for (const mode of ["major", "minor"]) {
      const group = make("optgroup", { label: mode });
      for (const tonic of TONICS)
        group.append(
          make("option", { value: `${tonic} ${mode}` }, `${tonic.replace("#", "♯").replace(/b$/, "♭")} ${mode}`),
        );
      select.append(group);
    }
    select.addEventListener("change", () => this.set({ key: select.value || null }));
    this.fields.push((settings) => {
      const key = settings.key ?? "";
      if (![...select.options].some((option) => option.value === key))
        select.append(make("option", { value: key }, key));
      select.value = key;
    });
    return make("div", { class: "field" }, make("label", { for: "set-key" }, "Key"), select);
  }

  seedField() {
    const input = make("input", {
      id: "set-seed",
      type: "number",
      min: 0,
      max: 4294967295,
      step: 1,
      placeholder: "new each time",
    });
    input.addEventListener("change", () =>
      this.set({ seed: input.value === "" ? null : Math.round(input.valueAsNumber) }),
    );
    this.fields.push((settings) => {
      if (document.activeElement !== input) input.value = settings.seed ?? "";
    });
    return make("div", { class: "field" }, make("label", { for: "set-seed" }, "Seed"), input);
  }

  midiFields() {
    const ports = [
      ["input", "MIDI keyboard"],
      ["output", "Play on"],
    ].map(([name, label]) => {
      const select = make("select", { id: `midi-${name}` });
      select.addEventListener("change", () => this.midi({ ...this.ports, [name]: select.value || null }));
      return { name, select, row: make("div", { class: "field" }, make("label", { for: select.id }, label), select) };
    });
    const note = make("p", { class: "remark", role: "status" }),
      ask = make("button", { type: "button", class: "small" }, "Use this browser’s MIDI");
    ask.hidden = !navigator.requestMIDIAccess;
    ask.addEventListener("click", async () => setText(note, await this.webMidi()));
    this.fields.push((settings, recommended, models, midi) => {
      this.ports = { input: midi.input ?? null, output: midi.output ?? null };
      for (const { name, select } of ports) {
        const names = [...(midi[`${name}s`] || []), ...(name === "output" && midi.virtual ? ["virtual"] : [])];
        const none = make("option", { value: "" }, name === "input" ? "none" : "this page");
        select.replaceChildren(
          none,
          ...names.map((each) => make("option", { value: each }, each === "virtual" ? "a new virtual port" : each)),
        );
        select.value = midi[name] ?? "";
        select.disabled = !names.length;
      }
      if (midi.problem || this.ports.input) setText(note, midi.problem || "");
    });
    return make("details", {}, make("summary", {}, "MIDI"), ...ports.map(({ row }) => row), ask, note);
  }

  render({ settings, models, ports }) {
    const shown = [settings, models, ports];
    if (this.shown && shown.every((value, i) => value === this.shown[i])) return;
    this.shown = shown;
    const model = models.find(({ name }) => name === settings.model) || models[0],
      recommended = model?.recommended || {};
    for (const field of this.fields) field(settings, recommended, models, ports);
  }
}
