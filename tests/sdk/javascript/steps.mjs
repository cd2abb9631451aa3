// A scenario's steps: each a promise of the engine, taken in order, its outcome told in one line of JSON.
import https from 'node:https'
import { setTimeout as sleep } from 'node:timers/promises'

const PATIENCE = 120_000 // ms after which a step that hangs is given up, and the rest of the scenario with it
const WAIT = 30_000 // ms that something which needs no more than one second is waited for

const all = []

export function step(promise, act) {
  all.push([promise, act])
}

export async function take(my) {
  for (const [promise, act] of all) {
    const started = performance.now()
    const tell = (outcome, words) => {
      const seconds = Math.round((performance.now() - started) / 10) / 100
      process.stdout.write(JSON.stringify({ promise, outcome, words, seconds }) + '\n')
    }
    const watchdog = setTimeout(() => {
      tell('failed', `hung for ${PATIENCE} ms`)
      process.exit(1)
    }, PATIENCE)
    try {
      await act(my)
      tell('kept', '')
    } catch (error) {
      if (error instanceof Absent) tell('absent', error.message)
      else tell('failed', error.stack ?? String(error))
    } finally {
      clearTimeout(watchdog)
    }
    if (!my.sandbox) return // none of the others can be taken
  }
}

// Thrown by a step whose SDK has no such call.
export class Absent extends Error {}

export async function refused(kind, call) {
  let value
  try {
    value = await call
  } catch (error) {
    if (error instanceof kind) return error
    throw error
  }
  throw new Error(`${kind.name} was due, and it gave ${value}`)
}

export async function until(happens) {
  const deadline = performance.now() + WAIT
  while (performance.now() < deadline) {
    const value = await happens()
    if (value) return value
    await sleep(50)
  }
  throw new Error(`Did not happen within ${WAIT} ms: ${happens}`)
}

// A client that is nobody's SDK. `fetch` refuses an address with a user in it, which is how a local domain is spelled.
export function page(url, headers = {}) {
  return new Promise((resolve, reject) => {
    https
      .get(url, { headers }, (answer) => {
        let text = ''
        answer.on('data', (chunk) => (text += chunk))
        answer.on('end', () => resolve({ status: answer.statusCode, text }))
        answer.on('error', reject)
      })
      .on('error', reject)
  })
}

// What a terminal has shown.
export class Screen {
  seen = ''
  onData = (data) => {
    this.seen += new TextDecoder().decode(data)
  }
  shows(text) {
    return until(() => this.seen.includes(text))
  }
}
