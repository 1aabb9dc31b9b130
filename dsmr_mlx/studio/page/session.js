// The page's copy of the session: the takes, and the music of each, joined as docs/studio-protocol.md defines it.
import { Music } from "/shared/music.js";

const ROOTS = new Set(["empty", "file", "played"]);
const SAME = 5e-4; // seconds
const KEPT = 32; // takes whose music is kept in memory

function remember(map, id, value) {
  map.set(id, value);
  if (map.size > KEPT) map.delete(map.keys().next().value);
  return value;
}

export class Session {
  constructor() {
    this.reset({ name: "", takes: [], selected: null, hidden: [], settings: {}, models: [], ports: {}, exports: [] });
  }

  reset(message) {
    this.name = message.name;
    this.takes = new Map(message.takes.map((take) => [take.id, take]));
    Object.assign(this, { settings: message.settings, models: message.models, exports: message.exports });
    this.ports = { input: null, output: null, inputs: [], outputs: [], ...message.ports };
    const idle = { activity: "idle", text: "", progress: null, takes: [], speed: null, turn: null, recording: false };
    this.status = { ...idle, ...message.status };
    this.rows = new Map();
    this.musics = new Map();
    this.arranged = null;
    this.select(message);
  }

  select({ selected, can_undo: canUndo, can_redo: canRedo, hidden }) {
    Object.assign(this, { selected, canUndo: Boolean(canUndo), canRedo: Boolean(canRedo) });
    this.hidden = new Set(hidden || []);
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

  setNotes({ take: id, notes, from, voice, pedal, end }) {
    const take = this.takes.get(id);
    if (!take) return;
    take.notes = take.notes.slice(0, from).concat(notes);
    take.voice = voice ? (take.voice || []).slice(0, from).concat(voice) : take.voice;
    if (pedal) take.pedal = pedal;
    if (end !== undefined) take.end = end;
    this.forget(id);
  }

  forget(id) {
    this.rows.delete(id);
    this.musics.delete(id);
    for (const child of this.tree.children.get(id) || []) this.forget(child.id);
  }

  // [onset, offset, pitch, velocity, voice] of the music of a take.
  rowsOf(id) {
    return this.rows.get(id) || remember(this.rows, id, this.joinRows(this.takes.get(id)));
  }

  joinRows(take) {
    const before = take.parent === null ? [] : this.rowsOf(take.parent),
      { begin, resume, after } = take;
    const across = new Map(
      before.filter((row) => row[0] < begin && row[1] > begin).map((row) => [`${row[0]} ${row[2]}`, row[4]]),
    );
    const maker = ROOTS.has(take.kind) ? 0 : 1;
    const own = take.notes.map((note, i) => {
      const held = across.get(`${note[0]} ${note[2]}`);
      return [...note.slice(0, 4), take.voice ? take.voice[i] : (held ?? maker)];
    });
    const joined = before.filter((row) => row[1] <= begin + SAME && row[0] < begin).concat(own);
    if (resume === null) return joined;
    const following = before.filter((row) => row[0] >= resume - SAME);
    return joined.concat(following.map((row) => [row[0] + after, row[1] + after, ...row.slice(2)]));
  }

  pedalOf(id) {
    const take = this.takes.get(id),
      before = take.parent === null ? [] : this.pedalOf(take.parent);
    const joined = before.filter(([time]) => time < take.begin).concat(take.pedal || []);
    if (take.resume === null) return joined;
    return joined.concat(
      before.filter(([time]) => time >= take.resume).map(([time, value]) => [time + take.after, value]),
    );
  }

  music(id) {
    if (!this.takes.has(id)) return new Music();
    if (this.musics.has(id)) return this.musics.get(id);
    const take = this.takes.get(id),
      made = take.growing ? take.end : Infinity;
    return remember(this.musics, id, new Music(this.rowsOf(id), { made, pedal: this.pedalOf(id) }));
  }

  // The take's own music, without what it shares with others.
  ownMusic(id) {
    const { begin, resume, end } = this.takes.get(id),
      last = resume === null ? Infinity : end;
    return new Music(this.rowsOf(id).filter(([onset]) => onset >= begin && onset < last));
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
