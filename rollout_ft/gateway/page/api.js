// How the gateway is asked. Owns the key: it is in this tab's session storage and in the header of each request, and nowhere else.
// Who was told it in a link has it in the fragment, which no server sees; it is taken out of the address at once.

const PLACE = "rollout_ft.operator_key";

export class Refused extends Error {}

export class Failed extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export function fragment() {
  return new URLSearchParams(location.hash.slice(1));
}

export function takeKey() {
  const told = fragment();
  const key = told.get("key");
  if (key === null) return;
  told.delete("key");
  const rest = told.toString();
  history.replaceState(null, "", location.pathname + location.search + (rest ? `#${rest}` : ""));
  keep(key);
}

export function keep(key) {
  sessionStorage.setItem(PLACE, key.trim());
}

export function forget() {
  sessionStorage.removeItem(PLACE);
}

export const key = () => sessionStorage.getItem(PLACE) || "";

export async function ask(path, parameters = {}) {
  if (!/^[\x21-\x7e]+$/.test(key())) throw new Refused("That is no key: it has letters and digits only.");
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== ""));
  let answer;
  try {
    answer = await fetch(query.size ? `${path}?${query}` : path, {
      headers: { authorization: `Bearer ${key()}` }, cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(20000),
    });
  } catch (e) {
    throw new Failed(e.name === "TimeoutError" ? "The gateway has not answered for 20 s." : "The gateway does not answer. Does the run still go on?");
  }
  if (answer.status === 401) throw new Refused("The run does not know this key: another run may be at this address now.");
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Failed(said.error ? `${said.error.message} (${said.error.code})` : `HTTP ${answer.status}`, answer.status);
  return said;
}
