// Numbers as the page writes them.

const NONE = "–";

export function count(n) {
  return Number.isFinite(n) ? n.toLocaleString("en-US") : NONE;
}

/** A mean: one digit after the point, none once it is large. */
export function mean(x) {
  if (!Number.isFinite(x)) return NONE;
  const digits = x < 1000 ? 1 : 0;
  return x.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function ratio(over, under) {
  return over > 0 && under > 0 ? `${(over / under).toFixed(2)}x` : NONE;
}

export function percent(share) {
  return Number.isFinite(share) ? `${Math.round(share * 100)} %` : NONE;
}

export function bytes(n) {
  if (!Number.isFinite(n)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (n >= 1024 && unit + 1 < units.length) {
    n /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || n >= 100 ? 0 : n >= 10 ? 1 : 2;
  return `${n.toFixed(digits)} ${units[unit]}`;
}

export function headName({ layer, head }) {
  return `layer ${layer}, head ${head}`;
}
