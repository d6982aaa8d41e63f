// The page: gets the release that the address names (?registry=URL&recipe=digits&ref=prod&target=T&key=URL), checks it on its
// golden vectors, and reads what is drawn.

import * as ort from "onnxruntime-web";
import {fromRegistry} from "./release.mjs";
import {drawing, picture} from "./drawing.mjs";
import {publicKey} from "./trust.mjs";

const byId = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);

ort.env.wasm.numThreads = 1; // more need the headers COOP and COEP, which few static hosts send

/** Rows for browsers come first; of the others, those whose graph isn't laid out for one CPU. */
function pick(release) {
  const web = release.targets((row) => row.platform === "web");
  return [...web, ...release.targets((row) => row.options.optimization !== "all")][0];
}

const serials = {
  get: (name) => localStorage.getItem(`exportyard:${name}`),
  set: (name, serial) => localStorage.setItem(`exportyard:${name}`, serial),
};

async function keyOf(address) {
  if (!address) return undefined;
  const answer = await fetch(new URL(address, location.href));
  if (!answer.ok) throw new Error(`${answer.url}: ${answer.status} ${answer.statusText}`);
  return publicKey(await answer.text());
}

function show(release, engine, signed) {
  const {recipe, version, source, checkpoint} = release.manifest;
  byId("release").textContent = `${recipe} v${version}`;
  const size = engine.entry.files.reduce((sum, file) => sum + file.size_bytes, 0);
  const facts = {
    engine: `${engine.target} (${engine.entry.scheme}), ${(size / 1000).toFixed(0)} kB`,
    "made from": `commit ${source.commit.slice(0, 10)}, weights ${Object.values(checkpoint)[0]?.slice(0, 10) ?? "?"}`,
    runtime: `onnxruntime-web ${ort.env.versions.web}`,
    verified: `every byte, by its digest; ${signed ? "the signature, with the key" : "no signature, for want of a key"}`,
  };
  for (const [name, text] of Object.entries(facts)) {
    byId("facts").append(element("dt", name), element("dd", text));
  }
}

function element(tag, text, kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = kind;
  return made;
}

function showGolden(rows) {
  for (const {name, output, words, good} of rows) {
    const line = document.createElement("tr");
    line.append(element("td", name), element("td", output), element("td", words));
    line.append(element("td", good ? "✓" : "✗", good ? "good" : "bad"));
    byId("golden").append(line);
  }
  const good = rows.length > 0 && rows.every((row) => row.good);
  const words = good ? "This browser reproduces the release's golden vectors." : "The numbers are not what was released.";
  byId("verdict").replaceChildren(element("span", words, good ? "good" : "bad"));
  document.body.dataset.state = good ? "ready" : "wrong";
}

function showAnswer(logits, took) {
  const top = Math.max(...logits);
  const shares = logits.map((value) => Math.exp(value - top));
  const sum = shares.reduce((total, share) => total + share, 0);
  byId("answer").textContent = logits.indexOf(top);
  byId("took").textContent = `answered in ${took.toFixed(1)} ms`;
  byId("bars").replaceChildren(
    ...shares.map((share, digit) => {
      const line = document.createElement("li");
      const bar = document.createElement("i");
      bar.style.setProperty("--share", share / sum);
      line.append(`${digit}`, bar, element("span", `${((100 * share) / sum).toFixed(1)}%`));
      return line;
    }),
  );
}

async function start() {
  const registry = new URL(query.get("registry") ?? "models", location.href);
  const progress = (done, total) => (byId("progress").value = total ? done / total : 0);
  const key = await keyOf(query.get("key"));
  const wishes = {key, serials, progress};
  const release = await fromRegistry(registry, query.get("recipe") ?? "digits", query.get("ref"), wishes);
  const target = query.get("target") ?? pick(release);
  if (!target) throw new Error("the release has no engine that a browser can run");
  const engine = await release.engine(ort, target, {executionProviders: ["wasm"]});
  show(release, engine, key !== undefined);
  showGolden(await engine.check());
  byId("progress").hidden = true;

  const [input] = release.manifest.signature.inputs;
  const [output] = release.manifest.signature.outputs;
  const read = async (pad) => {
    const data = picture(pad, byId("seen"));
    if (data === null) return;
    const since = performance.now();
    const answer = await engine.run({[input.name]: {type: "float32", dims: [1, 1, 8, 8], data}});
    showAnswer([...answer[output.name].data], performance.now() - since);
  };
  drawing(byId("pad"), read);
  byId("clear").onclick = () => {
    byId("pad").getContext("2d").clearRect(0, 0, byId("pad").width, byId("pad").height);
    byId("seen").getContext("2d").clearRect(0, 0, 8, 8);
    byId("answer").textContent = "–";
    byId("bars").replaceChildren();
    byId("took").textContent = "\u00a0";
  };
}

start().catch((error) => {
  byId("release").textContent = "No release";
  byId("progress").hidden = true;
  byId("verdict").replaceChildren(element("span", error.message, "bad"));
  document.body.dataset.state = "failed";
});
