// A canvas to draw on, and the picture of 8 by 8 that the network was trained on.

const SIDE = 8;
const FINE = 4; // dots to a side of a pixel: the training pictures are counts of dots, 4 by 4

/** Let people draw on `pad`; `read(pad)` is called as they go. */
export function drawing(pad, read) {
  const pen = pad.getContext("2d");
  Object.assign(pen, {lineWidth: pad.width / 7, lineCap: "round", lineJoin: "round", strokeStyle: "#fff"});
  let last = null;
  const at = (event) => {
    const box = pad.getBoundingClientRect();
    return [((event.clientX - box.left) * pad.width) / box.width, ((event.clientY - box.top) * pad.height) / box.height];
  };
  pad.onpointerdown = (event) => {
    pad.setPointerCapture(event.pointerId);
    last = at(event);
  };
  pad.onpointermove = (event) => {
    if (last === null) return;
    const next = at(event);
    pen.beginPath();
    pen.moveTo(...last);
    pen.lineTo(...next);
    pen.stroke();
    last = next;
    read(pad);
  };
  pad.onpointerup = pad.onpointercancel = () => {
    last = null;
    read(pad);
  };
}

/** What is drawn, as 64 numbers from 0 to 1: cut out, as tall as the picture, in its middle. Null if nothing is. */
export function picture(pad, seen) {
  const box = inkBox(pad);
  if (box === null) return null;
  const side = SIDE * FINE;
  const small = new OffscreenCanvas(side, side).getContext("2d");
  const scale = side / Math.max(box.width, box.height);
  const [width, height] = [box.width * scale, box.height * scale];
  small.drawImage(pad, box.x, box.y, box.width, box.height, (side - width) / 2, (side - height) / 2, width, height);
  const dots = small.getImageData(0, 0, side, side).data;
  const found = new Float32Array(SIDE * SIDE);
  for (let place = 0; place < side * side; place++) {
    const [x, y] = [Math.floor((place % side) / FINE), Math.floor(place / side / FINE)];
    found[y * SIDE + x] += dots[4 * place + 3] > 127 ? 1 / FINE ** 2 : 0;
  }
  const shown = new ImageData(SIDE, SIDE);
  found.forEach((value, place) => shown.data.set([255, 255, 255, 255 * value], 4 * place));
  seen.getContext("2d").putImageData(shown, 0, 0);
  return found;
}

function inkBox(pad) {
  const {data} = pad.getContext("2d").getImageData(0, 0, pad.width, pad.height);
  let [left, top, right, bottom] = [pad.width, pad.height, -1, -1];
  for (let place = 0; place < pad.width * pad.height; place++) {
    if (data[4 * place + 3] < 128) continue;
    const [x, y] = [place % pad.width, Math.floor(place / pad.width)];
    [left, top, right, bottom] = [Math.min(left, x), Math.min(top, y), Math.max(right, x), Math.max(bottom, y)];
  }
  return right < 0 ? null : {x: left, y: top, width: right - left + 1, height: bottom - top + 1};
}
