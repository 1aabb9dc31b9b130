// Files from this computer, chosen or dropped on the page: MIDI files to import, and downloaded sessions.
import { byId } from "/shared/music.js";

const MAX_BYTES = 5.5e6; // a message has at most 8 MiB, and base64 is a third longer

export class Files {
  // send(message): to the studio; complain(text): show a problem, "" for none.
  constructor({ send, complain }) {
    Object.assign(this, { send, complain });
    this.listen();
  }

  async open(files) {
    for (const file of files) {
      try {
        const message = await importMessage(file);
        this.complain("");
        this.send(message);
      } catch (error) {
        this.complain(error.message);
      }
    }
  }

  // Add a downloaded session to the sessions and open it.
  async uploadSession(file) {
    const name = encodeURIComponent(file.name.replace(/\.[^.]*$/, ""));
    try {
      const answer = await fetch(`/session?name=${name}`, { method: "POST", body: file });
      if (!answer.ok) return this.complain(await answer.text());
      this.complain("");
      this.send({ type: "open", name: (await answer.json()).name });
    } catch (error) {
      this.complain(`Cannot upload ${file.name}: ${error.message}`);
    }
  }

  listen() {
    byId("file").addEventListener("change", (event) => {
      this.open([...event.target.files]);
      event.target.value = "";
    });
    byId("session-file").addEventListener("change", (event) => {
      if (event.target.files.length) this.uploadSession(event.target.files[0]);
      event.target.value = "";
    });
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      byId("drop").hidden = false;
    });
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) byId("drop").hidden = true;
    });
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      byId("drop").hidden = true;
      this.open([...event.dataTransfer.files]);
    });
  }
}

// The message that imports a file. Throws if the file is too large.
async function importMessage(file) {
  if (file.size > MAX_BYTES) {
    const [found, most] = [(file.size / 1e6).toFixed(1), MAX_BYTES / 1e6];
    throw new Error(`${file.name} has ${found} MB, expected a MIDI file of at most ${most} MB`);
  }
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return { type: "import", name: file.name.replace(/\.midi?$/i, "").slice(0, 200) || "File", data: btoa(text) };
}
