// One scenario with the JavaScript SDKs of E2B: a line of JSON for each step.
import { take } from './steps.mjs'
import './use.mjs'
import './life.mjs'

await take({})
process.exit(0) // streams that a pause has cut may still be held by the SDK
