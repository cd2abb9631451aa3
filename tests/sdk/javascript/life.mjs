// What a user of the JavaScript SDKs does to a sandbox: its life from pause to kill, and what is refused.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import * as e2b from 'e2b'
import { Sandbox } from '@e2b/code-interpreter'
import { Absent, Screen, page, refused, step, until } from './steps.mjs'

const texts = JSON.parse(readFileSync(new URL('texts.json', import.meta.url)))
const { NUMBER } = texts
const listed = async (sandbox, pid) => (await sandbox.commands.list()).some((process) => process.pid === pid)

step('use_is_measured', async (my) => {
  const metrics = await until(async () => {
    const metrics = await my.sandbox.getMetrics()
    return metrics.length && metrics
  })
  const last = metrics.at(-1)
  assert.ok(last.memTotal > last.memUsed && last.memUsed > 0)
  assert.ok(last.cpuCount >= 1)
})

step('a_timeout_can_be_set_anew', async (my) => {
  await my.sandbox.setTimeout(900_000)
  const info = await my.sandbox.getInfo()
  assert.ok(info.endAt - info.startedAt > 800_000)
})

// Everything that the steps after it look for is put in place here.
step('a_pause_stops_the_sandbox', async (my) => {
  const { commands, files, pty } = my.sandbox
  await my.sandbox.runCode("kept = {'answer': 42}; log = open('/tmp/log', 'w'); written = log.write('before, ')")
  my.witness = await commands.run(texts.WITNESS, { background: true, timeoutMs: 0 })
  my.witness.wait().catch(() => {})
  await until(() => files.exists('/tmp/witness-number'))
  my.number = await files.read('/tmp/witness-number')
  const screen = new Screen()
  my.terminal = await pty.create({ rows: 24, cols: 80, timeoutMs: 0, onData: screen.onData })
  my.terminal.wait().catch(() => {})
  await pty.sendInput(my.terminal.pid, new TextEncoder().encode(`KEPT=${NUMBER}; echo set-$((KEPT))\n`))
  await screen.shows(`set-${NUMBER}`)

  assert.equal(await my.sandbox.pause(), true)
  assert.equal(await my.sandbox.isRunning(), false)
  assert.equal((await my.sandbox.getInfo()).state, 'paused')
})

step('a_command_s_stream_that_a_pause_cuts_ends_with_an_error', async (my) => {
  await refused(e2b.TimeoutError, my.witness.wait())
})

step('a_paused_sandbox_can_t_be_used_or_paused_again', async (my) => {
  assert.equal(await my.sandbox.pause(), false)
  await refused(e2b.TimeoutError, my.sandbox.runCode('1'))
  await refused(e2b.SandboxNotFoundError, my.sandbox.commands.run('true'))
  await refused(e2b.TimeoutError, my.sandbox.files.read('/tmp/log'))
  await refused(e2b.SandboxNotFoundError, my.sandbox.setTimeout(60_000))
})

step('paused_sandboxes_are_listed_by_metadata_and_in_pages', async (my) => {
  const second = await Sandbox.create({ metadata: { ...texts.METADATA, second: 'yes' } })
  await second.pause()
  const query = { state: ['paused'], metadata: texts.METADATA }

  const pages = Sandbox.list({ query, limit: 1 })
  const found = []
  while (pages.hasNext) {
    const items = await pages.nextItems()
    assert.ok(items.length <= 1)
    found.push(...items.map((info) => info.sandboxId))
  }
  assert.deepEqual(found, [second.sandboxId, my.sandbox.sandboxId])

  const oldestFirst = await Sandbox.list({ query, order: 'asc' }).nextItems()
  assert.deepEqual(oldestFirst.map((info) => info.sandboxId), found.toReversed())
  const startedAfter = new Date(oldestFirst[0].startedAt.getTime() + 1) // a Date has lost the microseconds
  const later = { metadata: texts.METADATA, startedAfter }
  assert.deepEqual((await Sandbox.list({ query: later }).nextItems()).map((info) => info.sandboxId), [second.sandboxId])

  assert.equal(await second.kill(), true)
  const [left, ...others] = await Sandbox.list({ query }).nextItems()
  assert.equal(left.sandboxId, my.sandbox.sandboxId)
  assert.deepEqual(others, [])
  assert.deepEqual(await Sandbox.list({ query: { ...query, state: ['running'] } }).nextItems(), [])
})

step('connect_wakes_it', async (my) => {
  const paused = my.sandbox
  my.sandbox = await Sandbox.connect(paused.sandboxId, { timeoutMs: 600_000 })

  assert.equal(my.sandbox.sandboxId, paused.sandboxId)
  assert.ok(await my.sandbox.isRunning())
  assert.deepEqual((await my.sandbox.getInfo()).metadata, texts.METADATA)
})

step('variables_survive_a_pause', async (my) => {
  assert.equal((await my.sandbox.runCode("kept['answer']")).text, '42')
})

step('an_open_file_survives_a_pause', async (my) => {
  await my.sandbox.runCode("written += log.write('after'); log.close()")
  assert.equal(await my.sandbox.files.read('/tmp/log'), 'before, after')
})

step('a_background_process_survives_a_pause', async (my) => {
  const { commands, files } = my.sandbox
  assert.ok(await listed(my.sandbox, my.witness.pid))
  await files.write('/tmp/witness-asked', '')
  await until(() => files.exists('/tmp/witness-answer'))
  assert.equal(await files.read('/tmp/witness-answer'), my.number)
  const joined = await commands.connect(my.witness.pid, { timeoutMs: 0 })
  assert.equal(await commands.kill(my.witness.pid), true)
  await refused(e2b.CommandExitError, joined.wait())
})

step('a_server_survives_a_pause', async (my) => {
  assert.ok(await listed(my.sandbox, my.server.pid))
  assert.equal((await page(my.url)).text, 'served from inside\n')
})

step('a_terminal_s_variables_survive_a_pause', async (my) => {
  const { pty } = my.sandbox
  const screen = new Screen()
  const terminal = await pty.connect(my.terminal.pid, { onData: screen.onData, timeoutMs: 0 })
  await pty.sendInput(terminal.pid, new TextEncoder().encode('echo again-$((KEPT+1))\n'))
  await screen.shows(`again-${NUMBER + 1}`)
  assert.equal(await pty.kill(terminal.pid), true)
  await refused(e2b.CommandExitError, terminal.wait())
})

step('a_pause_without_memory_keeps_the_files', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 300_000 })
  await sandbox.runCode('forgotten = 1')
  await sandbox.files.write('note', 'kept')
  assert.equal(await sandbox.pause({ keepMemory: false }), true)

  await sandbox.connect()
  assert.equal(await sandbox.files.read('note'), 'kept')
  assert.equal((await sandbox.runCode('forgotten')).error.name, 'NameError')
  assert.equal(await sandbox.kill(), true)
})

step('a_paused_sandbox_can_be_rebooted', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 300_000 })
  await sandbox.runCode("forgotten = 1; open('note', 'w').write('kept')")
  await sandbox.pause()

  await sandbox.connect({ onResume: 'reboot' })
  assert.equal((await sandbox.runCode("open('note').read()")).text, 'kept')
  assert.equal((await sandbox.runCode('forgotten')).error.name, 'NameError')
  assert.equal(await sandbox.kill(), true)
})

step('a_sandbox_can_be_reset', () => {
  throw new Absent("e2b can't reset")
})

step('a_timeout_pauses_where_that_was_asked_for', async () => {
  const asleep = await Sandbox.create({ timeoutMs: 300_000, lifecycle: { onTimeout: 'pause' } })
  await asleep.runCode("kept = 'over the timeout'")
  await asleep.setTimeout(1_000)
  await until(async () => (await asleep.getInfo()).state === 'paused')

  const sandbox = await Sandbox.connect(asleep.sandboxId)
  assert.equal((await sandbox.runCode('kept')).text, 'over the timeout')
  assert.equal(await sandbox.kill(), true)
})

step('a_timeout_kills_where_nothing_was_asked_for', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 300_000 })
  await sandbox.setTimeout(1_000)
  await until(async () => !(await sandbox.isRunning()))
  await refused(e2b.SandboxNotFoundError, sandbox.getInfo())
})

step('traffic_wakes_a_sandbox_that_was_made_so', async () => {
  const lifecycle = { onTimeout: 'pause', autoResume: true }
  const sandbox = await Sandbox.create({ timeoutMs: 300_000, lifecycle })
  await sandbox.runCode("kept = 'asleep'")
  await sandbox.pause()
  assert.equal((await sandbox.runCode('kept')).text, 'asleep')
  await sandbox.pause()
  assert.equal((await sandbox.commands.run('echo awake')).stdout, 'awake\n')
  assert.equal(await sandbox.kill(), true)
})

step('private_traffic_needs_the_sandbox_s_token', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 300_000, network: { allowPublicTraffic: false } })
  const server = await sandbox.commands.run(texts.SERVER, { background: true, timeoutMs: 0 })
  server.wait().catch(() => {})
  const url = `https://${sandbox.getHost(8000)}/page.html`
  const headers = { 'E2B-Traffic-Access-Token': sandbox.trafficAccessToken }
  await until(async () => (await page(url, headers)).status === 200)
  assert.equal((await page(url)).status, 403)
  assert.equal((await sandbox.runCode('1 + 1')).text, '2')
  assert.equal(await sandbox.kill(), true)
})

step('a_snapshot_makes_sandboxes_with_its_memory', async (my) => {
  await my.sandbox.runCode("kept['answer'] = 43")
  const { snapshotId } = await my.sandbox.createSnapshot()
  assert.equal((await my.sandbox.runCode("kept['answer'] += 1; kept['answer']")).text, '44')
  const known = await my.sandbox.listSnapshots().nextItems()
  assert.ok(known.some((snapshot) => snapshot.snapshotId === snapshotId))

  const sandbox = await Sandbox.create(snapshotId)
  assert.equal((await sandbox.runCode("kept['answer']")).text, '43')
  assert.equal(await sandbox.kill(), true)
  assert.equal(await Sandbox.deleteSnapshot(snapshotId), true)
  assert.equal(await Sandbox.deleteSnapshot(snapshotId), false)
})

step('copies_have_the_memory_and_go_their_own_ways', async (my) => {
  await my.sandbox.files.write('/tmp/copied', 'from the first')
  await my.sandbox.runCode("kept['answer'] = 50")
  const copies = await my.sandbox.fork({ count: 2, timeoutMs: 300_000 })
  assert.equal(new Set([my.sandbox, ...copies].map((sandbox) => sandbox.sandboxId)).size, 3)

  for (const [own, copy] of copies.entries()) {
    assert.equal(await copy.files.read('/tmp/copied'), 'from the first')
    assert.ok(await listed(copy, my.server.pid))
    await copy.files.write('/tmp/copied', 'copy')
    assert.equal((await copy.runCode(`kept['answer'] += ${own}; kept['answer']`)).text, String(50 + own))
  }
  assert.equal(await my.sandbox.files.read('/tmp/copied'), 'from the first')
  assert.equal((await my.sandbox.runCode("kept['answer']")).text, '50')
  for (const copy of copies) assert.equal(await copy.kill(), true)
})

step('what_only_a_cloud_has_is_refused_in_words', async (my) => {
  const template = e2b.Template().fromPythonImage('3')
  for (const call of [
    () => Sandbox.create({ volumeMounts: { '/mnt/data': 'a-volume' } }),
    () => Sandbox.create({ mcp: { exa: { apiKey: 'a-key' } } }),
    () => Sandbox.create({ iam: { tokens: { aws: e2b.Secret.iamToken({ audience: 'sts', tokenType: 'JWT-SVID' }) } } }),
    () => e2b.Volume.create('a-volume'),
    () => e2b.Secret.create('a-secret', 'its value'),
    () => e2b.Template.build(template, 'a-template'),
    () => my.sandbox.updateNetwork({ denyOut: ['0.0.0.0/0'] }),
  ]) {
    const error = await refused(Error, call())
    assert.match(error.message, /local engine/)
  }
})

step('code_whose_sandbox_is_paused_ends_with_an_error', async () => {
  const asleep = await Sandbox.create({ timeoutMs: 300_000 })
  await asleep.runCode("kept = 'whole'")
  let pausing
  const running = asleep.runCode(texts.ENDLESS, { onStdout: () => void (pausing = asleep.pause()) })
  await refused(e2b.TimeoutError, running)
  assert.equal(await pausing, true)

  const sandbox = await Sandbox.connect(asleep.sandboxId)
  assert.equal((await sandbox.runCode('kept')).text, 'whole')
  assert.equal(await sandbox.kill(), true)
})

step('code_whose_sandbox_is_killed_ends_with_an_error', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 300_000 })
  let killing
  const running = sandbox.runCode(texts.ENDLESS, { onStdout: () => void (killing = sandbox.kill()) })
  await refused(e2b.TimeoutError, running)
  assert.equal(await killing, true)
})

step('kill_ends_it_once', async (my) => {
  assert.equal(await my.sandbox.kill(), true)
  assert.equal(await my.sandbox.kill(), false)
  assert.equal(await my.sandbox.isRunning(), false)
})

step('a_killed_sandbox_is_known_as_gone', async (my) => {
  const { sandbox } = my
  await refused(e2b.SandboxNotFoundError, sandbox.getInfo())
  await refused(e2b.SandboxNotFoundError, sandbox.pause())
  await refused(e2b.SandboxNotFoundError, sandbox.setTimeout(60_000))
  await refused(e2b.SandboxNotFoundError, Sandbox.connect(sandbox.sandboxId))
  await refused(e2b.TimeoutError, sandbox.runCode('1'))
  await refused(e2b.SandboxNotFoundError, sandbox.commands.run('true'))
  await refused(e2b.TimeoutError, sandbox.files.read('/tmp/log'))
  assert.equal((await page(my.url)).status, 502)
})

step('what_was_never_there_is_refused', async () => {
  await refused(e2b.SandboxNotFoundError, Sandbox.connect('inosuchsandbox0000000'))
  const error = await refused(e2b.SandboxError, Sandbox.create('no-such-template'))
  assert.match(error.message, /404.*no-such-template/)
  assert.equal(await Sandbox.kill('inosuchsandbox0000000'), false)
})

step('one_key_makes_one_sandbox', () => {
  throw new Absent('e2b for JavaScript sends no key with a create')
})

step('a_wrong_key_is_refused', async () => {
  await refused(e2b.AuthenticationError, Sandbox.create({ apiKey: 'e2b_wrong' }))
  await refused(e2b.AuthenticationError, Sandbox.list({ apiKey: 'e2b_wrong' }).nextItems())
})
