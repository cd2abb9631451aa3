// What a user of the JavaScript SDKs does with a sandbox. Each step is a promise of the engine.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import * as e2b from 'e2b'
import { Sandbox } from '@e2b/code-interpreter'
import { Absent, Screen, page, refused, step, until } from './steps.mjs'

const texts = JSON.parse(readFileSync(new URL('texts.json', import.meta.url)))
const running = async (my, pid) => (await my.sandbox.commands.list()).some((process) => process.pid === pid)

step('a_sandbox_is_created_with_metadata_variables_and_a_timeout', async (my) => {
  my.sandbox = await Sandbox.create({ timeoutMs: 300_000, metadata: texts.METADATA, envs: { GREETING: 'hello' } })

  const info = await my.sandbox.getInfo()
  assert.equal(info.sandboxId, my.sandbox.sandboxId)
  assert.deepEqual(info.metadata, texts.METADATA)
  assert.equal(info.state, 'running')
  assert.ok(Math.abs(info.endAt - info.startedAt - 300_000) < 5_000)
  assert.ok(await my.sandbox.isRunning())
})

step('code_gives_its_value', async (my) => {
  const execution = await my.sandbox.runCode("import os; os.environ['GREETING'] + ' world'")

  assert.equal(execution.text, 'hello world')
  assert.equal(execution.error, undefined)
  assert.equal(execution.executionCount, 1)
})

step('a_call_s_own_variables_are_seen_by_that_call_only', async (my) => {
  const seen = "import os; os.environ.get('OWN')"
  assert.equal((await my.sandbox.runCode(seen, { envs: { OWN: 'for once' } })).text, 'for once')
  assert.equal((await my.sandbox.runCode(seen)).text, undefined)
})

step('a_plot_comes_as_an_image_and_as_a_chart', async (my) => {
  const [result] = (await my.sandbox.runCode(texts.PLOT)).results

  assert.ok(result.png.startsWith('iVBOR'))
  assert.equal(result.chart.type, 'bar')
  assert.equal(result.chart.title, 'Sales')
  const bars = result.chart.elements.map((bar) => [bar.label, Number(bar.value)])
  assert.deepEqual(bars, [['Q1', 3], ['Q2', 5]])
})

step('results_come_in_every_kind', async (my) => {
  const execution = await my.sandbox.runCode(texts.KINDS)
  const given = new Set(execution.results.flatMap((result) => [...result.formats()]))
  for (const kind of ['html', 'markdown', 'svg', 'latex', 'json', 'javascript', 'data']) assert.ok(given.has(kind), kind)
})

step('output_streams_while_the_code_runs', async (my) => {
  const heard = []
  const results = []
  const code = texts.READY_THEN_GO.replaceAll('{path}', '/tmp/go-code')
  const execution = await my.sandbox.runCode(code, {
    // The code goes on only when its first line has been answered.
    onStdout: async (message) => {
      heard.push(message.line)
      if (message.line.includes('ready')) await my.sandbox.files.write('/tmp/go-code', '')
    },
    onStderr: (message) => heard.push(message.line),
    onResult: (result) => results.push(result.text),
  })

  assert.deepEqual(new Set(heard), new Set(['ready\n', 'warned\n']))
  assert.deepEqual(results, ['done'])
  assert.equal(execution.logs.stdout.join(''), 'ready\n')
})

step('code_that_raises_is_a_result', async (my) => {
  const errors = []
  const execution = await my.sandbox.runCode('1 / 0', { onError: (error) => errors.push(error.name) })

  assert.deepEqual(errors, ['ZeroDivisionError'])
  assert.equal(execution.error.value, 'division by zero')
  assert.ok(execution.error.traceback.includes('1 / 0'))
})

step('code_that_runs_too_long_is_stopped_and_its_context_goes_on', async (my) => {
  await my.sandbox.runCode("before = 'kept'")
  const endless = my.sandbox.runCode('import time\nwhile True: time.sleep(0.1)', { timeoutMs: 1_000 })
  await refused(e2b.TimeoutError, endless)
  assert.equal((await my.sandbox.runCode('before')).text, 'kept')
})

step('contexts_have_their_own_names_and_directories', async (my) => {
  const context = await my.sandbox.createCodeContext({ cwd: '/tmp', language: 'python' })
  assert.equal((await my.sandbox.runCode('import os; mine = 1; os.getcwd()', { context })).text, '/tmp')
  assert.equal((await my.sandbox.runCode('mine')).error.name, 'NameError')
  assert.ok((await my.sandbox.listCodeContexts()).some((known) => known.id === context.id))

  await my.sandbox.restartCodeContext(context)
  assert.equal((await my.sandbox.runCode('mine', { context })).error.name, 'NameError')

  await my.sandbox.removeCodeContext(context)
  await refused(e2b.NotFoundError, my.sandbox.runCode('1', { context }))
})

step('other_languages_have_kernels_of_their_own', async (my) => {
  await my.sandbox.runCode('WORD=shell', { language: 'bash' })
  const echoed = await my.sandbox.runCode('echo $WORD', { language: 'bash' })
  assert.equal(echoed.logs.stdout.join(''), 'shell\n')
  const doubled = await my.sandbox.runCode('[1, 2].map(n => n * 2).join()', { language: 'js' })
  assert.equal(doubled.text, '2,4')
})

step('a_language_without_a_kernel_is_refused_in_words', async (my) => {
  const error = await refused(e2b.SandboxError, my.sandbox.runCode('1', { language: 'cobol' }))
  assert.match(error.message, /400/) // all that this SDK shows of it
})

step('a_command_gives_its_output_and_exit_code', async (my) => {
  const { commands } = my.sandbox
  const said = 'echo $GREETING $OWN; pwd; echo problem >&2'
  const result = await commands.run(said, { envs: { OWN: 'you' }, cwd: '/tmp' })

  assert.equal(result.stdout, 'hello you\n/tmp\n')
  assert.equal(result.stderr, 'problem\n')
  assert.equal(result.exitCode, 0)
  assert.equal((await commands.run('whoami; pwd')).stdout, 'user\n/home/user\n')
  assert.equal((await commands.run('whoami', { user: 'root' })).stdout, 'root\n')
})

step('a_command_that_fails_raises_with_all_it_said', async (my) => {
  const failing = my.sandbox.commands.run('echo so far; echo no >&2; exit 3')
  const { exitCode, stdout, stderr } = await refused(e2b.CommandExitError, failing)
  assert.deepEqual({ exitCode, stdout, stderr }, { exitCode: 3, stdout: 'so far\n', stderr: 'no\n' })
})

step('a_command_s_output_streams_while_it_runs', async (my) => {
  const waits = 'echo ready; until [ -e /tmp/go-command ]; do sleep 0.05; done; echo done'
  const onStdout = async (text) => {
    if (text.includes('ready')) await my.sandbox.files.write('/tmp/go-command', '')
  }
  assert.equal((await my.sandbox.commands.run(waits, { onStdout })).stdout, 'ready\ndone\n')
})

step('a_background_command_is_listed_joined_and_killed', async (my) => {
  const { commands } = my.sandbox
  const started = await commands.run('echo up; exec sleep 1000', { background: true })
  assert.ok(await running(my, started.pid))

  const joined = await commands.connect(started.pid)
  assert.equal(joined.pid, started.pid)
  assert.equal(await commands.kill(started.pid), true)
  await refused(e2b.CommandExitError, joined.wait())
  await refused(e2b.CommandExitError, started.wait())
  await until(async () => !(await running(my, started.pid)))
  assert.equal(await commands.kill(started.pid), false)
})

step('a_command_reads_what_is_sent_to_it', async (my) => {
  const { commands } = my.sandbox
  const reader = await commands.run('head -n 2 | tr a-z A-Z', { background: true, stdin: true })
  await commands.sendStdin(reader.pid, 'one\n')
  await commands.sendStdin(reader.pid, 'two\n')
  assert.equal((await reader.wait()).stdout, 'ONE\nTWO\n')
})

step('the_end_of_a_command_s_input_can_be_sent', async (my) => {
  const { commands } = my.sandbox
  const reader = await commands.run('cat', { background: true, stdin: true })
  await commands.sendStdin(reader.pid, 'all\n')
  await commands.closeStdin(reader.pid)
  assert.equal((await reader.wait()).stdout, 'all\n')
})

step('a_command_s_input_can_be_streamed', () => {
  throw new Absent("e2b for JavaScript can't stream a command's input")
})

step('a_command_past_its_timeout_is_ended', async (my) => {
  const { commands } = my.sandbox
  await refused(e2b.TimeoutError, commands.run('exec sleep 1234', { timeoutMs: 1_000 }))
  await until(async () => (await commands.run("pgrep -f '[s]leep 1234' || echo none")).stdout === 'none\n')
})

step('files_are_written_and_read', async (my) => {
  const { files } = my.sandbox
  assert.equal((await files.write('notes/größe.txt', 'größer\n')).path, '/home/user/notes/größe.txt')
  assert.equal(await files.read('notes/größe.txt'), 'größer\n')

  const everyByte = Uint8Array.from({ length: 1_280_000 }, (_, index) => index % 256)
  await files.write('/tmp/every-byte', everyByte.buffer)
  assert.deepEqual(await files.read('/tmp/every-byte', { format: 'bytes' }), everyByte)
  const stream = await files.read('/tmp/every-byte', { format: 'stream' })
  assert.deepEqual(new Uint8Array(await new Response(stream).arrayBuffer()), everyByte)
  await files.write('/tmp/streamed', new Blob([everyByte]).stream())
  assert.equal((await files.getInfo('/tmp/streamed')).size, everyByte.length)

  await files.write('/tmp/zipped', 'again '.repeat(1000), { gzip: true })
  assert.equal(await files.read('/tmp/zipped', { gzip: true }), 'again '.repeat(1000))

  const many = [0, 1, 2].map((number) => ({ path: `/tmp/many/${number}`, data: String(number) }))
  assert.deepEqual((await files.write(many)).map((info) => info.path), many.map((file) => file.path))
  assert.equal(await files.read('/tmp/many/2'), '2')
})

step('files_are_found_moved_and_removed', async (my) => {
  const { files } = my.sandbox
  assert.equal(await files.makeDir('/tmp/made/deep'), true)
  assert.equal(await files.makeDir('/tmp/made/deep'), false)
  await files.write('/tmp/made/deep/file', '12345')
  const paths = (await files.list('/tmp/made', { depth: 2 })).map((entry) => entry.path)
  assert.deepEqual(paths, ['/tmp/made/deep', '/tmp/made/deep/file'])

  assert.equal((await files.rename('/tmp/made/deep/file', '/tmp/made/moved')).path, '/tmp/made/moved')
  assert.equal(await files.exists('/tmp/made/deep/file'), false)
  const { name, size, owner, permissions, type } = await files.getInfo('/tmp/made/moved')
  assert.deepEqual([name, size, owner, permissions, type], ['moved', 5, 'user', '-rw-r--r--', e2b.FileType.FILE])

  await files.remove('/tmp/made')
  assert.equal(await files.exists('/tmp/made'), false)
})

step('files_belong_to_the_user_who_writes_them', async (my) => {
  const { files } = my.sandbox
  await files.write('/root/secret', 'for root', { user: 'root' })
  assert.equal(await files.read('/root/secret', { user: 'root' }), 'for root')
  assert.equal((await files.getInfo('/root/secret', { user: 'root' })).owner, 'root')
})

step('files_carry_metadata', async (my) => {
  await my.sandbox.files.write('/tmp/tagged', '', { metadata: { source: 'a test' } })
  assert.deepEqual((await my.sandbox.files.getInfo('/tmp/tagged')).metadata, { source: 'a test' })
})

step('signed_urls_move_files_without_the_sdk', async (my) => {
  const body = new FormData()
  body.append('file', new Blob(['by url']))
  const uploaded = await fetch(await my.sandbox.uploadUrl('/tmp/signed', { user: 'user' }), { method: 'POST', body })
  assert.equal(uploaded.status, 200)
  const url = await my.sandbox.downloadUrl('/tmp/signed', { user: 'user' })
  assert.equal(await (await fetch(url)).text(), 'by url')
  assert.equal((await fetch(url.replace('signature=v1_', 'signature=v1_x'))).status, 401)
  const old = await my.sandbox.downloadUrl('/tmp/signed', { user: 'user', useSignatureExpiration: -10 })
  assert.equal((await fetch(old)).status, 401)
})

step('what_goes_wrong_with_files_has_its_own_error', async (my) => {
  const { commands, files } = my.sandbox
  await refused(e2b.FileNotFoundError, files.read('/nowhere'))
  await refused(e2b.FileNotFoundError, files.list('/nowhere'))
  await refused(e2b.FileNotFoundError, files.rename('/nowhere', '/tmp/there'))
  await refused(e2b.InvalidArgumentError, files.read('/tmp'))
  await refused(e2b.AuthenticationError, files.read('/etc/hostname', { user: 'nobody-here' }))
  await refused(e2b.AuthenticationError, commands.run('true', { user: 'nobody-here' }))
  await refused(e2b.InvalidArgumentError, commands.run('true', { cwd: '/nowhere' }))
})

step('a_repository_is_kept_with_git', async (my) => {
  const { files, git } = my.sandbox
  await git.init('repository', { initialBranch: 'main' })
  await files.write('repository/file', '1')
  await git.add('repository')
  await git.commit('repository', 'A first commit', { authorName: 'A user', authorEmail: 'user@example.org' })
  const status = await git.status('repository')
  assert.deepEqual([status.currentBranch, status.isClean], ['main', true])
})

step('a_terminal_takes_input_is_resized_and_killed', async (my) => {
  const { pty } = my.sandbox
  const screen = new Screen()
  const options = { rows: 24, cols: 80, timeoutMs: 0, envs: { OWN: 'seven' }, onData: screen.onData }
  const terminal = await pty.create(options)
  const type = (text) => pty.sendInput(terminal.pid, new TextEncoder().encode(text))
  await type('echo $OWN-$((6*7)) $(stty size)\n')
  await screen.shows('seven-42 24 80')

  await pty.resize(terminal.pid, { rows: 40, cols: 100 })
  await type('echo now $(stty size)\n')
  await screen.shows('now 40 100')

  assert.equal(await pty.kill(terminal.pid), true)
  await refused(e2b.CommandExitError, terminal.wait())
  await until(async () => !(await running(my, terminal.pid)))
})

step('a_watched_directory_tells_what_happens_in_it', async (my) => {
  const { files } = my.sandbox
  const seen = new Set()
  await files.makeDir('/tmp/watched')
  let ended
  const exit = new Promise((resolve) => (ended = resolve))
  const onEvent = (event) => void seen.add(`${event.type} ${event.name}`)
  const watch = await files.watchDir('/tmp/watched', onEvent, { recursive: true, onExit: ended })
  await files.write('/tmp/watched/new', '1')
  await files.makeDir('/tmp/watched/sub')
  await files.rename('/tmp/watched/new', '/tmp/watched/renamed')
  await files.remove('/tmp/watched/renamed')

  const due = ['create new', 'write new', 'rename new', 'create sub', 'remove renamed']
  await until(() => due.every((event) => seen.has(event)))
  await watch.stop()
  await exit
})

step('a_port_that_the_sandbox_opens_is_reached_from_outside', async (my) => {
  my.server = await my.sandbox.commands.run(texts.SERVER, { background: true, timeoutMs: 0 })
  my.server.wait().catch(() => {}) // the pause cuts its stream
  my.url = `https://${my.sandbox.getHost(8000)}/page.html`
  await until(async () => (await page(my.url)).status === 200)
  assert.equal((await page(my.url)).text, 'served from inside\n')
  const closed = await page(`https://${my.sandbox.getHost(8001)}/`)
  assert.equal(closed.status, 502)
  assert.match(closed.text, /port is not open/)
})
