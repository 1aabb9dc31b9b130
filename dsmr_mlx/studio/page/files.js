// Opening MIDI files.
const MAX_BYTES = 5.5e6; // a message has at most 8 MiB, and base64 is a third longer

// The message that imports a file. Throws if the file is too large.
export async function importMessage(file) {
  if (file.size > MAX_BYTES) {
    const [found, most] = [(file.size / 1e6).toFixed(1), MAX_BYTES / 1e6];
    throw new Error(`${file.name} has ${found} MB, expected a MIDI file of at most ${most} MB`);
  }
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return { type: "import", name: file.name.replace(/\.midi?$/i, "").slice(0, 200) || "File", data: btoa(text) };
}
