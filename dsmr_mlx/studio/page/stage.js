// The roll and the strip below it: seeking, scrolling, zooming, and marking a passage by mouse, pen, touch and keys.
import { byId, clamp, clock, setAttribute, toThousandths } from "/shared/music.js";
import { Overview, PianoRoll } from "/shared/piano_roll.js";

const GRIP = 9; // pixels around the edge of a passage in which it can be dragged
const MOVED = 5; // pixels from which a press is a drag
const SHORTEST = 0.1; // seconds of a passage

export class Stage {
  // seek(seconds): called for clicks. changed(): called if a redraw is needed. position(): of the playhead.
  constructor({ seek, changed, position }) {
    Object.assign(this, { seek, changed, position, marking: false, press: null, touches: new Map() });
    this.canvas = byId("roll");
    this.roll = new PianoRoll(this.canvas, { room: 30, minKeys: 44 });
    this.overview = new Overview(byId("overview"), this.roll);
    this.listen();
  }

  get passage() {
    return this.roll.passage;
  }

  setMusic(music) {
    this.roll.setMusic(music);
    if (this.passage && !music.growing && this.passage[0] >= music.duration) this.mark(null);
    this.changed();
  }

  // The picture in words, for screen readers.
  label(music) {
    const { passage } = this,
      marked = passage ? `, passage from ${clock(passage[0], 1)} to ${clock(passage[1], 1)} marked` : "";
    return `Piano roll: ${music.count} notes, ${clock(music.duration)}${marked}`;
  }

  draw(at) {
    this.roll.draw(at);
    this.overview.draw(at);
    const strip = byId("overview"),
      now = clock(at),
      all = clock(this.roll.music.duration);
    setAttribute(strip, "aria-valuemax", String(Math.floor(this.roll.music.duration)));
    setAttribute(strip, "aria-valuenow", String(Math.floor(at)));
    setAttribute(strip, "aria-valuetext", `${now} of ${all}`);
  }

  // passage: [start, end] in any order, or null.
  mark(passage) {
    if (passage) {
      const last = this.roll.music.duration;
      const [start, end] = [Math.min(...passage), Math.max(...passage)].map((t) => toThousandths(clamp(t, 0, last)));
      passage = end - start >= SHORTEST ? [start, end] : null;
    }
    this.roll.passage = passage;
    this.changed();
  }

  // Moves one edge of the passage to the playhead; edge 0: the start, 1: the end.
  markEdge(edge, at) {
    const other = this.passage
      ? this.passage[1 - edge]
      : edge
        ? Math.max(0, at - 4)
        : Math.min(at + 4, this.roll.music.duration);
    if (edge ? other >= at : other <= at) this.mark(edge ? [Math.max(0, at - 4), at] : [at, at + 4]);
    else this.mark(edge ? [other, at] : [at, other]);
  }

  setMarking(on) {
    this.marking = on;
    this.canvas.classList.toggle("marking", on);
    this.changed();
  }

  zoom(factor) {
    this.roll.zoom(factor);
    this.changed();
  }

  timeOf(event) {
    return clamp(this.roll.timeAt(event.clientX, this.position()), 0, this.roll.music.duration);
  }

  edgeAt(event) {
    if (!this.passage) return -1;
    const f = this.roll.frame(this.position()),
      x = event.clientX - this.canvas.getBoundingClientRect().left;
    return this.passage.findIndex((time) => Math.abs(f.x(time) - x) <= GRIP);
  }

  onDown(event) {
    if (event.button) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.touches.set(event.pointerId, event.clientX);
    const edge = this.edgeAt(event),
      pans = event.pointerType === "touch" && !this.marking && edge < 0;
    const start = edge < 0 ? this.timeOf(event) : this.passage[1 - edge];
    this.press = { x: event.clientX, moved: false, pans, start, grip: edge >= 0 };
  }

  onMove(event) {
    if (!this.press) {
      this.canvas.style.cursor = this.edgeAt(event) >= 0 ? "ew-resize" : "";
      return;
    }
    const before = this.touches.get(event.pointerId);
    if (this.touches.size === 2) return this.pinch(event, before);
    this.press.moved ||= Math.abs(event.clientX - this.press.x) > MOVED;
    if (!this.press.moved) return;
    if (this.press.pans) {
      this.roll.scroll((before - event.clientX) / this.roll.frame(this.position()).scale);
      this.touches.set(event.pointerId, event.clientX);
      this.changed();
    } else {
      this.mark([this.press.start, this.timeOf(event)]);
    }
  }

  pinch(event, before) {
    const [other] = [...this.touches].filter(([id]) => id !== event.pointerId).map(([, x]) => x);
    const wide = Math.abs(event.clientX - other),
      was = Math.abs(before - other);
    this.touches.set(event.pointerId, event.clientX);
    this.press.moved = true;
    if (was > 10 && wide > 10) this.zoom(wide / was);
  }

  onUp(event) {
    this.touches.delete(event.pointerId);
    if (!this.press || this.touches.size) return;
    const { moved, grip } = this.press;
    this.press = null;
    if (moved && this.marking) this.setMarking(false);
    if (moved || grip || event.type === "pointercancel") return;
    if (this.passage) this.mark(null);
    this.seek(this.timeOf(event));
  }

  onWheel(event) {
    event.preventDefault();
    const turned = event.deltaY + event.deltaX;
    if (event.ctrlKey || event.metaKey) this.zoom(Math.exp(-event.deltaY / 300));
    else this.roll.scroll((turned * (event.deltaMode ? 20 : 1)) / this.roll.frame(this.position()).scale);
    this.changed();
  }

  listen() {
    const { canvas } = this,
      strip = byId("overview");
    canvas.addEventListener("pointerdown", (event) => this.onDown(event));
    canvas.addEventListener("pointermove", (event) => this.onMove(event));
    for (const type of ["pointerup", "pointercancel"]) canvas.addEventListener(type, (event) => this.onUp(event));
    canvas.addEventListener("wheel", (event) => this.onWheel(event), { passive: false });
    const drag = (event) => this.seek(clamp(this.overview.timeAt(event.clientX), 0, this.roll.music.duration));
    strip.addEventListener("pointerdown", (event) => {
      strip.setPointerCapture(event.pointerId);
      drag(event);
    });
    strip.addEventListener("pointermove", (event) => {
      if (strip.hasPointerCapture(event.pointerId)) drag(event);
    });
    new ResizeObserver(() => this.changed()).observe(canvas);
  }
}
