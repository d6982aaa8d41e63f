// Runs a release in Node with onnxruntime-node, and checks it on its golden vectors:
//
//   node check.mjs REGISTRY_URL RECIPE [VERSION|CHANNEL]
//   node check.mjs RELEASE_FOLDER
//
// `--target T` names the engine; else the first that suits this machine is taken. With `--key FILE.pub` the release must be
// signed with that key.

import {webcrypto} from "node:crypto";
import {readFile} from "node:fs/promises";
import {join} from "node:path";
import {parseArgs} from "node:util";
import * as ort from "onnxruntime-node";
import {Release, digestOf, fromRegistry, signedDigests, verify} from "../browser/release.mjs";
import {checkFiles, publicKey} from "../browser/trust.mjs";

globalThis.crypto ??= webcrypto; // Node 18

async function fromFolder(folder, key) {
  const manifest = JSON.parse(await readFile(join(folder, "manifest.json"), "utf8"));
  if (key) {
    if (!manifest.beside?.includes("signature.json")) throw new Error(`the release in ${folder} is not signed`);
    const names = ["manifest.json", ...manifest.beside];
    const beside = await Promise.all(names.map(async (name) => [name, await digestOf(await readFile(join(folder, name)))]));
    const bundle = JSON.parse(await readFile(join(folder, "signature.json"), "utf8"));
    await checkFiles(bundle, key, signedDigests(manifest, beside));
  }
  return new Release(manifest, async (file) => {
    const bytes = await readFile(join(folder, file.path));
    await verify(bytes, file.sha256, file.size_bytes, file.path);
    return bytes;
  });
}

const machine = {x64: "x86_64", arm64: "aarch64"}[process.arch] ?? process.arch;
const suits = (row) => ["any", process.platform].includes(row.platform) && ["any", machine].includes(row.machine);

try {
  const options = {target: {type: "string"}, key: {type: "string"}};
  const {values, positionals} = parseArgs({options, allowPositionals: true});
  const [from, recipe, ref] = positionals;
  if (!from) throw new Error("usage: node check.mjs REGISTRY_URL RECIPE [REF] | RELEASE_FOLDER  [--target T] [--key FILE.pub]");
  const key = values.key && (await publicKey(await readFile(values.key, "utf8")));
  const release = await (recipe ? fromRegistry(from, recipe, ref, {key}) : fromFolder(from, key));
  const target = values.target ?? release.targets(suits)[0];
  if (!target) throw new Error(`the release has no engine for ${process.platform} on ${machine}`);
  const engine = await release.engine(ort, target);
  console.log(`${release.manifest.recipe} v${release.manifest.version}, ${target} (${engine.entry.scheme})`);
  const rows = await engine.check();
  for (const {name, output, words, good} of rows) {
    console.log(`${good ? "ok" : "WRONG"}`.padEnd(6) + `${name.padEnd(5)}${output}: ${words}`);
  }
  process.exitCode = rows.every(({good}) => good) ? 0 : 1;
} catch (error) {
  console.error(`check.mjs: ${error.message}`);
  process.exitCode = 2;
}
