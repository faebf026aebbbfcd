// Images for a message: read, reduced to the size that models use, and kept as `data:` URLs.

const MAX_SIDE = 1568;
const KEPT_TYPES = new Set(["image/png", "image/jpeg", "image/webp"]);
const MAX_KEPT_BYTES = 1 << 20;

/** Return a file's image as a `data:` URL; throws if the browser cannot read it. */
export async function readImage(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && KEPT_TYPES.has(file.type) && file.size <= MAX_KEPT_BYTES) return asUrl(file);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL(file.type === "image/png" ? "image/png" : "image/jpeg", 0.9);
}

function asUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
