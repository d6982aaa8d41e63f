// Checks signatures with a public key: ECDSA on P-256, in a DSSE envelope around an in-toto statement.

const PAYLOAD = "application/vnd.in-toto+json";
const FILES = "https://model_signing/signature/v1.0";
const CHANNEL = "urn:exportyard:channel:v1";

/** A public key from PEM text, as `exportyard keygen` writes it. */
export async function publicKey(pem) {
  const body = pem.replace(/-----[A-Z ]+-----|\s/g, "");
  return crypto.subtle.importKey("spki", bytesOf(body), {name: "ECDSA", namedCurve: "P-256"}, false, ["verify"]);
}

/** Throw unless `key` has signed exactly these files: digests in hex by path, without signature.json. */
export async function checkFiles(bundle, key, digests) {
  const statement = await opened(bundle.dsseEnvelope, key, "the release");
  if (statement.predicateType !== FILES) throw new Error("what is signed is no list of files");
  const signed = new Map(statement.predicate.resources.map((one) => [one.name, one]));
  for (const [path, digest] of Object.entries(digests)) {
    const one = signed.get(path);
    if (one?.algorithm !== "sha256" || one.digest !== digest) throw new Error(`${path} is not what was signed`);
  }
}

/** The serial number of a channel's assignment; throw unless `key` has signed this one. */
export async function checkChannel(envelope, key, {recipe, channel, version, digest}) {
  const {predicateType, predicate, subject} = await opened(envelope, key, `the channel ${channel}`);
  const digests = subject.map((one) => `sha256:${one.digest.sha256}`);
  const said = [predicateType, predicate.recipe, predicate.channel, predicate.version, ...digests];
  if (String(said) !== String([CHANNEL, recipe, channel, version, digest])) {
    throw new Error(`the registry says that ${channel} is v${version}, which is not what was signed`);
  }
  return predicate.serial;
}

async function opened(envelope, key, what) {
  const payload = bytesOf(envelope?.payload ?? "");
  const head = new TextEncoder().encode(`DSSEv1 ${PAYLOAD.length} ${PAYLOAD} ${payload.length} `);
  const message = new Uint8Array([...head, ...payload]);
  for (const {sig} of envelope?.payloadType === PAYLOAD ? envelope.signatures : []) {
    const numbers = pair(bytesOf(sig));
    if (numbers && (await crypto.subtle.verify({name: "ECDSA", hash: "SHA-256"}, key, numbers, message))) {
      return JSON.parse(new TextDecoder().decode(payload));
    }
  }
  throw new Error(`${what} is not signed with the key that was given`);
}

/** Both numbers of a signature in DER, 32 bytes each; null if it is none. */
function pair(der) {
  const both = new Uint8Array(64);
  let at = 2;
  for (const end of [32, 64]) {
    if (der[at] !== 2) return null;
    const number = der.subarray(at + 2, at + 2 + der[at + 1]);
    const digits = number.subarray(Math.max(0, number.length - 32)); // DER puts a zero before what looks negative
    both.set(digits, end - digits.length);
    at += 2 + der[at + 1];
  }
  return der[0] === 0x30 && at === der.length ? both : null;
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}
