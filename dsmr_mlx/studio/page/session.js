// The page's copy of the session: the takes, and the music of each, joined as docs/studio-protocol.md defines it.
import { firstAbove, Music, toThousandths } from "/shared/music.js";

export const NO_PORTS = { input: null, output: null, inputs: [], outputs: [] };
const ROOTS = new Set(["empty", "file", "played"]);
const SAME = 5e-4; // seconds
const KEPT = 32; // takes whose music is kept in memory
const AROUND = 2; // seconds of the music around a take in its picture
const PICTURED = 8; // seconds that a picture shows at least
const SETTLED = 100; // own notes that have not changed, from which on they are joined to the music before them

// Where the picture of a take begins and ends.
export function pictured({ begin, end, resume }) {
  const from = Math.max(begin - AROUND, 0);
  return [from, Math.max(end + (resume === null ? 0 : AROUND), from + PICTURED)];
}

// Two pieces of music with rows between them. Only what overlaps is sorted; the other columns are copied.
export class Joined extends Music {
  constructor(before, rows, after, options) {
    let first = after.count ? after.onset[0] : Infinity,
      last = before.count ? before.onset[before.count - 1] : -Infinity;
    for (const [onset] of rows) [first, last] = [Math.min(first, onset), Math.max(last, onset)];
    const count = firstAbove(before.onset, first - SAME),
      from = firstAbove(after.onset, last + SAME);
    super([...rowsBetween(before, count, before.count), ...rows, ...rowsBetween(after, 0, from)], options);
    for (const name of ["onset", "end", "pitch", "velocity", "voice"]) {
      const parts = [before[name].subarray(0, count), this[name], after[name].subarray(from)];
      this[name] = new this[name].constructor(count + this.count + after.count - from);
      parts.reduce((start, part) => (this[name].set(part, start), start + part.length), 0);
    }
    this.count = this.onset.length;
    this.reach = new Float64Array(this.count);
    this.reach.set(before.reach.subarray(0, count));
    let latest = count ? this.reach[count - 1] : 0;
    for (let i = count; i < this.count; i++) this.reach[i] = latest = Math.max(latest, this.end[i]);
    this.duration = Math.max(this.growing ? this.made : 0, latest);
  }
}

// shared: `earlier`, the music before a take and the first `count` of its own rows, and `later`. Own rows that have not
// changed, those before `from`, are added to the earlier; undefined if it has some that have changed.
function settle(shared, rows, from) {
  if (!shared || shared.count > from) return undefined;
  if (from - shared.count < SETTLED) return shared;
  return { ...shared, earlier: new Joined(shared.earlier, rows.slice(shared.count, from), new Music()), count: from };
}

function rowsBetween({ onset, end, pitch, velocity, voice }, from, to) {
  const rows = [];
  for (let i = from; i < to; i++) rows.push([onset[i], end[i], pitch[i], velocity[i], voice[i]]);
  return rows;
}

export class Session {
  constructor() {
    this.reset({ name: "", takes: [], selected: null, hidden: [], settings: {}, models: [], ports: {}, exports: [] });
  }

  reset(message) {
    this.name = message.name;
    this.takes = new Map(message.takes.map((take) => [take.id, take]));
    Object.assign(this, { settings: message.settings, models: message.models, exports: message.exports });
    this.ports = { ...NO_PORTS, ...message.ports };
    const idle = { activity: "idle", text: "", progress: null, takes: [], speed: null, turn: null, recording: false };
    this.status = { ...idle, ...message.status };
    this.parts = new Map(); // what is known of the music of each take, the latest last
    this.arranged = null;
    this.chosen = null;
    this.select(message);
  }

  // What the studio has selected. It is shown unless the user has chosen another take meanwhile.
  select({ selected, can_undo: canUndo, can_redo: canRedo, hidden }) {
    Object.assign(this, { confirmed: selected, canUndo: Boolean(canUndo), canRedo: Boolean(canRedo) });
    this.hidden = new Set(hidden || []);
    if (this.chosen === null) this.selected = selected;
  }

  // Show a take before the studio has selected it. Returns a function to call with whether the studio answered:
  // without a connection the choice remains.
  choose(id) {
    const choice = (this.chosen = { id });
    this.selected = id;
    return (answered) => {
      if (this.chosen !== choice) return;
      this.chosen = null;
      if (answered) this.selected = this.confirmed;
    };
  }

  get take() {
    return this.takes.get(this.selected) || null;
  }

  // All takes in order, and the children of each (null: the roots), undone ones included.
  get tree() {
    if (this.arranged) return this.arranged;
    const takes = [...this.takes.values()].sort((a, b) => a.id - b.id),
      children = new Map([[null, []], ...takes.map(({ id }) => [id, []])]);
    for (const take of takes) children.get(take.parent)?.push(take);
    return (this.arranged = { takes, children });
  }

  get visible() {
    return this.tree.takes.filter(({ id }) => !this.hidden.has(id));
  }

  get empty() {
    return this.visible.every((take) => take.kind === "empty");
  }

  children(id) {
    return (this.tree.children.get(id) || []).filter((take) => !this.hidden.has(take.id));
  }

  // The takes with the same parent, this one included; none for a root.
  alternatives(take) {
    return take && take.parent !== null ? this.children(take.parent) : [];
  }

  growing() {
    return this.visible.filter((take) => take.growing);
  }

  setTake(fields) {
    const known = this.takes.get(fields.id) || { notes: [], voice: null, pedal: [] };
    this.takes.set(fields.id, { ...known, ...fields });
    this.arranged = null;
    this.forget(fields.id);
  }

  setNotes({ take: id, notes, from, voice, pedal, pedal_from: pedalFrom, end }) {
    const take = this.takes.get(id);
    if (!take) return;
    take.notes = take.notes.slice(0, from).concat(notes);
    take.voice = voice ? (take.voice || []).slice(0, from).concat(voice) : take.voice;
    if (pedal) take.pedal = take.pedal.slice(0, pedalFrom).concat(pedal);
    if (end !== undefined) take.end = end;
    const { joint, shared, own, moves } = this.parts.get(id) || {};
    this.forget(id);
    if (!joint || !own) return;
    const rows = own.slice(0, from).concat(this.rowsFrom(take, from, joint));
    this.parts.set(id, { joint, shared: settle(shared, rows, from), own: rows, moves: pedal ? undefined : moves });
  }

  // A part of the music of a take, made when it is first needed.
  part(id, name, make) {
    const known = this.parts.get(id)?.[name];
    if (known) return known;
    const made = make(this.takes.get(id)),
      parts = { ...this.parts.get(id), [name]: made };
    this.parts.delete(id);
    this.parts.set(id, parts);
    if (this.parts.size > KEPT) this.parts.delete(this.parts.keys().next().value);
    return made;
  }

  forget(id) {
    this.parts.delete(id);
    for (const child of this.tree.children.get(id) || []) this.forget(child.id);
  }

  // [onset, offset, pitch, velocity, voice] of the music of a take.
  rowsOf(id) {
    return this.part(id, "rows", () => {
      const { before, following } = this.jointOf(id);
      return before.concat(this.ownRows(id), following);
    });
  }

  // What a take has from its parent: the rows before and after its own, the last of those before (for the picture), and
  // the voices of the notes that sound across its beginning.
  jointOf(id) {
    return this.part(id, "joint", (take) => {
      const rows = take.parent === null ? [] : this.rowsOf(take.parent),
        { begin, resume, after } = take;
      const across = rows.filter((row) => row[0] < begin && row[1] > begin),
        before = rows.filter((row) => row[1] <= begin + SAME && row[0] < begin),
        following = resume === null ? [] : rows.filter((row) => row[0] >= resume - SAME);
      return {
        before,
        last: before.filter((row) => row[1] > begin - AROUND),
        voices: new Map(across.map((row) => [`${row[0]} ${row[2]}`, row[4]])),
        following: following.map(([onset, end, ...rest]) => [
          toThousandths(onset + after),
          toThousandths(end + after),
          ...rest,
        ]),
      };
    });
  }

  ownRows(id) {
    return this.part(id, "own", (take) => this.rowsFrom(take, 0, this.jointOf(id)));
  }

  rowsFrom({ notes, voice, kind, begin }, first, { voices }) {
    const maker = ROOTS.has(kind) ? 0 : 1;
    return notes.slice(first).map(([onset, end, pitch, velocity], i) => {
      const held = onset < begin ? voices.get(`${onset} ${pitch}`) : undefined;
      return [onset, end, pitch, velocity, voice ? voice[first + i] : (held ?? maker)];
    });
  }

  pedalOf(id) {
    return this.part(id, "moves", (take) => {
      const before = take.parent === null ? [] : this.pedalOf(take.parent);
      const joined = before.filter(([time]) => time < take.begin).concat(take.pedal || []);
      if (take.resume === null) return joined;
      return joined.concat(
        before.filter(([time]) => time >= take.resume).map(([time, value]) => [time + take.after, value]),
      );
    });
  }

  music(id) {
    if (!this.takes.has(id)) return new Music();
    const { before, following } = this.jointOf(id),
      { earlier, count, later } = this.part(id, "shared", () => {
        return { earlier: new Music(before), count: 0, later: new Music(following) };
      });
    return this.part(id, "music", ({ growing, end }) => {
      const options = { made: growing ? end : Infinity, pedal: this.pedalOf(id) };
      return new Joined(earlier, this.ownRows(id).slice(count), later, options);
    });
  }

  // The take's own music, without what it shares with others.
  ownMusic(id) {
    return this.part(id, "ownMusic", ({ begin, resume, end }) => {
      const last = resume === null ? Infinity : end;
      return new Music(this.ownRows(id).filter(([onset]) => onset >= begin && onset < last));
    });
  }

  // The music that the picture of a take shows.
  picturedMusic(id) {
    return this.part(id, "picture", (take) => {
      const { last, following } = this.jointOf(id),
        until = pictured(take)[1];
      const next = following.filter(([onset]) => onset < until);
      return new Music(last.concat(this.ownRows(id), next));
    });
  }

  // The music of a take up to a point, where playback waits for new music.
  beginning(id, at) {
    const rows = id === null ? [] : this.rowsOf(id).filter((row) => row[0] < at);
    return new Music(
      rows.map((row) => [row[0], Math.min(row[1], at), ...row.slice(2)]),
      { made: at },
    );
  }
}
